"""Does the log still say what was written? Checks the chain of digests. Knows no store: it gets the records."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turnout.events.envelope import Recorded


class Problem(msgspec.Struct, frozen=True):
    """Where the chain breaks. ``sequence`` is of the event whose predecessor is not what it was."""

    subject: str
    sequence: int
    what: str


def verify_chain(records: Iterable[Recorded]) -> list[Problem]:
    """Check records of one or more subjects, each subject from its first event on, in the order of the log.

    A changed event shows at the one after it, because each carries the digest of the event before. So a change of a
    subject's newest event, and the removal of its newest events, cannot show here: compare the subject's last digest
    with one that was noted elsewhere.
    """
    problems: list[Problem] = []
    heads: dict[str, Recorded] = {}
    last = 0
    for record in records:
        before = heads.get(record.subject)
        expected = before.digest if before else ""
        if record.sequence <= last:
            problems.append(
                Problem(record.subject, record.sequence, f"comes after event {last} but has a lower number")
            )
        if record.envelope.previous != expected:
            problems.append(Problem(record.subject, record.sequence, _broken(before, record.envelope.previous)))
        heads[record.subject] = record
        last = record.sequence
    return problems


def _broken(before: Recorded | None, named: str) -> str:
    if before is None:
        return f"is the first event here, but names a previous one with digest {named[:12]}: events before it are gone"
    if not named:
        return (
            f"says that it is the first of its subject, but event {before.sequence} stands before it: one was inserted"
        )
    return (
        f"names digest {named[:12]} for the event before it, but event {before.sequence} has {before.digest[:12]}: "
        f"event {before.sequence} was changed, or an event between them was removed or inserted"
    )
