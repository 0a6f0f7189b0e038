"""Which versions may follow each other in one engine, or share one as adapters, as far as the log tells. Pure.

It foretells what a worker will do, so that memory is planned by it; the worker looks at the files itself
(``workers/inference/shape.py``), and what was foretold wrongly costs a cold start, never a wrong answer.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from turnout.events.model import EngineSpec, Inspection


def fit(engine: EngineSpec, inspection: Inspection | None) -> str:
    """Equal for versions that may use the same engine, one after the other or, as adapters, together; empty for none.

    ``inspection``: what the version's files say; without it nothing is known of a version that has files.
    """
    if engine.url or engine.command or (engine.path and inspection is None):
        return ""
    files: tuple[str, ...] = ()
    if inspection is not None:
        files = (inspection.shape_digest, inspection.tensors_digest)
        if engine.adapter:
            files = (engine.path, inspection.base_digest)
    told = msgspec.json.encode((engine.kind, engine.args, bool(engine.adapter), files))
    return hashlib.sha256(told).hexdigest()[:16]
