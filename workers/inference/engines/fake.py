"""Engine kind ``fake``: starts the fake server that is shipped with turnout. Its flags stand in fake_server.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import turnout
from turnout.workers.inference.engines.base import (
    BASE,
    CHAT,
    COMPLETIONS,
    SLEEP_FLAG,
    Launch,
    Refusal,
    Sign,
    Site,
    own_probe,
    unshared,
)

if TYPE_CHECKING:
    from turnout.events.model import EngineSpec

_SIGNS = (
    Sign("Starting to load model", "loading"),
    Sign("Loading weights took", "warming"),
    Sign("Application startup complete", "warming"),
)


class FakeEngine:
    """Starts ``fake_server`` with the interpreter that runs the worker."""

    kind = "fake"

    def plan(self, spec: EngineSpec, model: str, version: str, site: Site) -> Launch | Refusal:
        """The version's args go first, so that where it listens and what it is called are the worker's."""
        if spec.adapter and not site.unix:
            return unshared()
        where = ("--socket", site.socket) if site.unix else ("--host", site.host, "--port", str(site.port))
        weights = spec.path or version
        source = str(Path(turnout.__file__).parent.parent)  # a checkout that is not installed must be found as well
        return Launch(
            argv=(
                *(sys.executable, "-m", "turnout.workers.inference.engines.fake_server"),
                *(*spec.args, *where, f"--model={model}{BASE if spec.adapter else ''}", f"--version={version}"),
                *(("--enable-lora",) if spec.adapter else ()),
                *(("--weights", weights if site.weights else "") if site.unix else ()),
            ),
            address=site.address(unix=site.unix),
            model=model,
            env={
                "PYTHONPATH": os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH", "")) if p),
                "PYTHONSAFEPATH": "1",
            },
            probes=own_probe(spec, (COMPLETIONS, CHAT)),
            fingerprint=version,
            logprobs=True,
            counts=True,
            signs=_SIGNS,
            fills=site.unix and not spec.adapter,
            adapters=("--enable-lora",) if spec.adapter else (),
            empty=not site.weights,
            weights=weights,
            sleeps=site.unix and not spec.adapter and SLEEP_FLAG in spec.args,
        )
