"""What goes wrong, as problem+json (RFC 9457). A refusal, a failure of the infrastructure and a bug never look alike.

Knows the exceptions of the client and of the framework; no resource.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import msgspec
import structlog
from litestar import Response
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec

from turnout.core.decider import Rejected
from turnout.events.store import Damaged, LogReplaced, StoreFull, Unavailable
from turnout.workers.answers import CommandRejected, ControllerBug

if TYPE_CHECKING:
    from collections.abc import Mapping

    from litestar.connection import Request

log = structlog.get_logger()

PROBLEM_JSON = "application/problem+json"
#: Seconds after which a request that met an infrastructure failure may be sent again, with the same key.
_RETRY_S = 1
_RETRY_FULL_S = 30

#: Status of a refusal by the end of its code; what is in none of them is a conflict with what is.
_STATUS_BY_END = {"_unknown": 404, "_invalid": 422, "_missing": 422, "_stale": 412}
_STATUS = {"idempotency_key_reused": 422, "versions_equal": 422}


class Problem(msgspec.Struct, frozen=True):
    """What went wrong.

    Attributes:
        type: a name of the kind of problem, ``urn:turnout:problem:<code>``.
        title: the status in words.
        status: of the answer.
        detail: one sentence with the names and numbers.
        code: stable word for programs, e.g. ``version_unknown``.
        hint: what to do next.
        instance: this request, ``urn:turnout:request:<id>``; its id stands in ``x-request-id`` and in the log, too.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str
    instance: str = ""


def problem(status: int, code: str, detail: str, hint: str, request_id: str = "") -> Problem:
    """A problem from its parts."""
    instance = f"urn:turnout:request:{request_id}" if request_id else ""
    return Problem(f"urn:turnout:problem:{code}", HTTPStatus(status).phrase, status, detail, code, hint, instance)


def status_of(code: str) -> int:
    """HTTP status of a refusal."""
    end = f"_{code.rpartition('_')[2]}"
    return _STATUS.get(code) or _STATUS_BY_END.get(end, 409)


def refusal(status: int, code: str, reason: str, hint: str) -> CommandRejected:
    """A refusal that this process makes itself; ``status`` must be what its code stands for."""
    if status_of(code) != status:
        raise ValueError(f"{code} is answered with {status_of(code)}, not with {status}")
    return CommandRejected(Rejected(code, reason, hint))


def of(error: Exception, request_id: str = "") -> tuple[Problem, dict[str, str]]:
    """The problem that an exception is, and the headers that belong to it."""
    match error:
        case CommandRejected(answer=answer):
            return problem(status_of(answer.code), answer.code, answer.reason, answer.hint, request_id), {}
        case StoreFull():
            reason, _, hint = str(error).partition("; ")
            made = problem(
                503, error.code, reason, hint or "make room, then send it again with the same key", request_id
            )
            return made, {"retry-after": str(_RETRY_FULL_S)}
        case Unavailable():
            reason, _, hint = str(error).partition("; ")
            made = problem(503, error.code, reason, hint or "send it again with the same key", request_id)
            return made, {"retry-after": str(_RETRY_S)}
        case Damaged() | LogReplaced():
            return problem(500, "log_damaged", str(error), "check the log: turnout verify", request_id), {}
        case ControllerBug(answer=answer):
            return problem(500, answer.code, answer.reason, answer.hint, request_id), {}
        case HTTPException():
            return _of_http(error, request_id), dict(error.headers or {})
        case _:
            log.error("bug_in_admin", request=request_id, exc_info=error)
            hint = "this is a fault of turnout: report it with the log of the admin process"
            return problem(500, "bug", "the management API failed on this request", hint, request_id), {}


def answer(request: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    """The framework's handler for every exception."""
    scope = cast("Mapping[str, object]", request.scope)
    made, headers = of(error, str(scope.get("turnout_request", "")))
    return Response(made, status_code=made.status, headers=headers, media_type=PROBLEM_JSON)


def spec(*statuses: int) -> Mapping[int, ResponseSpec]:
    """What the schema says of an operation's problems."""
    return {
        status: ResponseSpec(
            Problem, generate_examples=False, description=HTTPStatus(status).phrase, media_type=PROBLEM_JSON
        )
        for status in statuses
    }


def _of_http(error: HTTPException, request_id: str) -> Problem:
    """What the framework itself refuses."""
    status = error.status_code
    code, hint = {
        400: ("request_invalid", "see /openapi.json for what this request may carry"),
        404: ("path_unknown", "see /openapi.json for the paths that there are"),
        405: ("method_unknown", "the header Allow names the methods of this path"),
        413: ("body_too_large", "send less; [admin] max_body_bytes is the limit"),
        415: ("media_type_unknown", "send application/json"),
    }.get(status, ("request_invalid" if status < 500 else "bug", "see /openapi.json"))
    return problem(status, code, _detail(error), hint, request_id)


def _detail(error: HTTPException) -> str:
    """The framework's message with each field that is wrong."""
    extra = cast("list[dict[str, str]]", error.extra if isinstance(error.extra, list) else [])
    fields = [f"{one.get('key') or one.get('source') or 'body'}: {one.get('message', 'invalid')}" for one in extra]
    return "; ".join(fields) or error.detail or HTTPStatus(error.status_code).phrase
