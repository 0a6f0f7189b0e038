"""Versions with files, against real processes: looked at before they are loaded, refused where they have changed.

The engine is the fake one; the files are those of a small model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import Cluster, Stage, on_stage
from tests.unit.inference import files

from turnout.events.instance import InstanceFailed, InstanceRequested
from turnout.events.model import EngineSpec, VersionValidated
from turnout.workers.client import DynamicModelRegistry
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.process, pytest.mark.nats]

SMALL = """
[switch]
bake_s = 0.0

[worker]
quiet_s = 0.2
"""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(base=SMALL))
    one.run(one.cluster.serving("v1"))
    yield one
    one.close()


async def register(c: Cluster, version: str, folder: Path, *words: str) -> tuple[int, str, str]:
    source = ("--engine", "fake", "--source", str(folder))
    return await c.command("register", "chat", version, *source, *words)


@on_stage
async def test_a_version_with_files_is_looked_at_loaded_and_compared(c: Cluster) -> None:
    one = files.folder(c.folder / "models" / "a")
    other = files.folder(c.folder / "models" / "b", changed="model.layers.2.mlp.up_proj.weight")
    code, out, err = await register(c, "a1", one, "--tag", "tickets")
    assert code == 0, err
    assert "validated by w1: LlamaForCausalLM" in out
    assert (await register(c, "a2", other, "--parent", "a1"))[0] == 0
    assert (await c.switched("a1")).phase == "completed"
    assert (await c.switched("v1")).phase == "completed"
    code, out, err = await c.command("compare", "chat", "a1", "a2", "--json")
    assert code == 0, err
    made = json.loads(out)
    assert made["layers"]["changed"] == ["model.layers.2"]
    assert made["first"]["loads"] == 1
    assert made["tokenizer"] is True
    code, out, err = await c.command("versions", "chat", "--json")
    told = {one["version"]: one for one in json.loads(out)["versions"]}
    assert (told["a1"]["state"], told["a1"]["loads"], told["a2"]["loads"]) == ("validated", 1, 0)
    await c.views_are_the_fold()


@on_stage
async def test_corrupted_files_are_refused_when_they_are_registered(c: Cluster) -> None:
    folder = files.folder(c.folder / "models" / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    code, _, err = await register(c, "cut", folder)
    assert code == 1
    assert "model.safetensors ends after" in err
    assert "Traceback" not in err
    code, _, err = await c.command("switch", "chat", "cut", "--wait")
    assert code == 1
    assert "cut can't be served" in err
    files.folder(folder)  # mended
    code, _, err = await register(c, "cut", folder)
    assert code == 0, err


@on_stage
async def test_files_that_were_swapped_after_they_were_registered_are_not_loaded_and_nobody_notices(c: Cluster) -> None:
    folder = files.folder(c.folder / "models" / "swapped")
    code, _, err = await register(c, "swapped", folder)
    assert code == 0, err
    files.safetensors(folder / "model.safetensors", files.shapes(), changed="model.norm.weight")
    load = c.load()
    await c.answered(load)
    view = await c.switched("swapped")
    await c.answered(load)
    assert (view.phase, view.stage) == ("failed", "checking"), view
    assert "the files are not those that were registered" in view.reason
    assert c.world.models["chat"].validated["swapped"].digest[:16] in view.reason
    assert not c.engine_pids("swapped")
    history = await c.history()
    history.clean()
    assert {reply.version for reply in history.replies} == {"v1"}
    failed = [s.recorded.event for s in c.seen if isinstance(s.recorded.event, InstanceFailed)]
    assert any(one.stage == "checking" for one in failed)


@on_stage
async def test_a_switch_right_after_the_registration_is_not_refused_for_being_early(c: Cluster) -> None:
    big: files.Shapes = {"model.embed_tokens.weight": ("BF16", (8000, 4000)), "model.norm.weight": ("BF16", (4000,))}
    folder = files.folder(c.folder / "models" / "early", big)  # 64 MB: reading them takes a moment
    registry = DynamicModelRegistry(BaseRegistry(), c.client)
    view = await registry.register_model("chat", "early", EngineSpec("fake", str(folder)))
    assert view.state == "checking"
    assert (await c.switched("early")).phase == "completed"
    events = [s.recorded.event for s in c.seen]
    looked = next(n for n, e in enumerate(events) if isinstance(e, VersionValidated) and e.version == "early")
    loaded = next(n for n, e in enumerate(events) if isinstance(e, InstanceRequested) and e.version == "early")
    assert looked < loaded
    assert (await c.switched("v1")).phase == "completed"


@on_stage
async def test_a_worker_that_is_killed_while_it_looks_is_followed_by_one_that_looks_again(c: Cluster) -> None:
    folder = files.folder(c.folder / "models" / "killed")
    c.kill("w1")
    registry = DynamicModelRegistry(BaseRegistry(), c.client)
    await registry.register_model("chat", "killed", EngineSpec("fake", str(folder)))
    await c.restart("w1")
    await c.until(lambda: "killed" in c.world.models["chat"].validated, "the files are looked at")
