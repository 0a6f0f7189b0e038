"""The description and the API agree: schemathesis asks every operation by it, with bodies that fit or do not."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from tests.unit.admin.conftest import FAKE, Api

from turnout.events.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Requests for each operation in each mode: some 10 s for all of them on one core.
EXAMPLES = 6
#: It takes a refusal with 412 or 422 for wrong, but what a schema allows may still be stale or meaningless.
EXCLUDED: list[Any] = [cast("Any", checks).positive_data_acceptance]
#: It has no end: tests of its own follow it.
WITHOUT_END = "/v1/log/stream"


@pytest.fixture(scope="module")
def asked() -> Iterator[Api]:
    """An app that has a model with two versions, a worker and a switch."""
    with asyncio.Runner() as runner:
        api = Api(runner, MemoryStore())
        api.worker()
        for version in ("v1", "v2"):
            api.done("PUT", f"/v1/models/chat/versions/{version}", json=FAKE)
        api.done("POST", "/v1/switches", json={"model": "chat", "version": "v1"})
        yield api


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_operation_answers_as_it_is_described(asked: Api, mode: GenerationMode) -> None:
    described = asked("GET", "/openapi.json").json()
    del described["security"]  # the token is always there; tests of its own leave it out
    loaded: Any = schemathesis.openapi.from_dict(described)
    operations = [one.ok() for one in loaded.get_all_operations()]
    assert len(operations) > 30
    for operation in operations:
        if operation.path != WITHOUT_END:
            with contextlib.suppress(Unsatisfiable):  # nothing that could be sent is outside of this operation's schema
                _ask(asked, operation, mode)


def _ask(api: Api, operation: Any, mode: GenerationMode) -> None:
    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        sent = requests.Request(**case.as_transport_kwargs(base_url="http://admin")).prepare()
        answer = api(sent.method or "", sent.url or "", content=sent.body, headers=dict(sent.headers))
        stale = [cast("Any", checks).negative_data_rejection] if answer.status_code == 412 else []  # it knows no 412
        case.validate_response(answer, excluded_checks=[*EXCLUDED, *stale])

    ask()
