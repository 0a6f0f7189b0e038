"""What a request says besides its body: who asks, its idempotency key, the state that it was made from. And paging.

Turns these into the command's own id, actor and sequence. Knows the client; no resource.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import msgspec
from litestar.di import NamedDependency
from litestar.params import HeaderParameter, QueryParameter

from turnout.core.decider import Accepted
from turnout.workers.admin import problems
from turnout.workers.client import Client

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Who is named in the log where a request names nobody.
ACTOR = "http"
#: Keys whose requests are remembered, to tell one that is used for something else.
_KEYS_MOST = 10_000
_DIGEST_LENGTH = 12
_ETAG = re.compile(r'"(\d{1,18})"')

T = TypeVar("T")

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        pattern=r"^[A-Za-z0-9._:-]{1,100}$",
        description="Made by you, for one change: sent again with it, it takes effect once and is answered the same.",
    ),
]
IfMatch = Annotated[
    str | None,
    HeaderParameter(
        name="If-Match",
        max_length=100,
        description="The ETag that you have read: refused with 412 where somebody has changed the resource since.",
    ),
]
ActorName = Annotated[
    str | None,
    HeaderParameter(
        name="X-Turnout-Actor",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}$",
        description="Who asks, for the log.",
    ),
]
Limit = Annotated[int, QueryParameter(ge=1, le=1000, description="Items on one page.")]
After = Annotated[str | None, QueryParameter(max_length=200, description="The `next` of the page before.")]


class Asked(msgspec.Struct, frozen=True):
    """What a command's request says in its headers."""

    actor: str
    key: str
    if_sequence: int | None


async def asked(idempotency_key: IdempotencyKey = None, if_match: IfMatch = None, actor: ActorName = None) -> Asked:
    """Read the headers.

    Raises:
        CommandRejected: a name that only turnout's own settings file acts under, or an ETag of nothing.
    """
    if actor == "config":
        raise problems.refusal(422, "name_invalid", "the actor 'config' is turnout.toml itself", "give your own name")
    return Asked(actor or ACTOR, idempotency_key or "", None if if_match is None else _sequence(if_match))


class Desk:
    """Sends commands under their idempotency keys."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._keys: OrderedDict[str, str] = OrderedDict()

    async def send(self, asked: Asked, verb: str, body: msgspec.Struct) -> Accepted:
        """Send a command, and again until it is answered.

        Its id is made from the key and from what is asked for, so that a key which is used again for something else
        never gets the other command's answer.

        Raises:
            CommandRejected: refused, or the key was used for another command.
            Unavailable, StoreFull, ControllerBug: as ``Client.send``.
        """
        id = ""
        if asked.key:
            digest = hashlib.sha256(verb.encode() + msgspec.json.encode(body, order="deterministic")).hexdigest()
            if self._keys.setdefault(asked.key, digest) != digest:
                raise problems.refusal(
                    422,
                    "idempotency_key_reused",
                    f"the idempotency key {asked.key!r} was used for another change",
                    "make a new key for each change; keep it only for retries of the same one",
                )
            self._keys.move_to_end(asked.key)
            if len(self._keys) > _KEYS_MOST:
                self._keys.popitem(last=False)
            id = f"{asked.key}.{digest[:_DIGEST_LENGTH]}"
        answer = await self._client.send(verb, body, actor=asked.actor, id=id, if_sequence=asked.if_sequence)
        if not isinstance(answer, Accepted):
            raise TypeError(f"{verb} was answered with {type(answer).__name__}")
        return answer


#: What handlers get.
Control = NamedDependency[Client]
Commands = NamedDependency[Desk]
Told = NamedDependency[Asked]


class Items(msgspec.Struct, Generic[T], frozen=True):
    """One page. ``next``: ask with it as ``after`` for those behind; None where this is the last."""

    items: tuple[T, ...]
    next: str | None


def page(found: Mapping[str, Any], after: str | None, limit: int) -> Items[Any]:
    """A page of what has been found, in the order of the names."""
    names = sorted(name for name in found if after is None or name > after)
    shown = names[:limit]
    return Items(tuple(found[name] for name in shown), shown[-1] if len(names) > limit else None)


def etag(sequence: int) -> dict[str, str]:
    """The header of a representation that stands for a sequence."""
    return {"etag": f'"{sequence}"'}


def _sequence(if_match: str) -> int:
    """The sequence in an ETag of ours."""
    found = _ETAG.fullmatch(if_match.strip())
    if found is None:
        raise problems.refusal(
            412,
            "sequence_stale",
            f"If-Match is {if_match!r}, which is no ETag that was ever answered here",
            "read the resource and send its ETag as it is, with its quotes",
        )
    return int(found[1])
