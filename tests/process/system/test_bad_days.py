"""Things that can't work: each ends with one clear message and an exit code, and leaves nothing half-done."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.process.system.cluster import Cluster, Stage, alone, free_port, on_stage, turnout_argv

import turnout
from turnout.events.instance import InstanceReady
from turnout.events.model import EngineSpec, Probe
from turnout.events.route import RouteChanged
from turnout.workers.client import DynamicModelRegistry
from turnout.workers.registry import BaseRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.process, pytest.mark.nats]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    one = Stage(lambda: Cluster(base=SMALL))
    one.run(one.cluster.serving("v1"))
    yield one
    one.close()


SMALL = """
[switch]
bake_s = 0.0

[worker]
quiet_s = 0.2
"""


@pytest.mark.parametrize(
    ("args", "stage_of_failure", "said"),
    [
        (("--crash-at-load",), "loading", ""),
        (("--garbage",), "proving", "golden probe"),
        (("--empty",), "proving", "golden probe"),
        (("--loop",), "proving", "golden probe"),
        (("--nan",), "proving", "golden probe"),
        (("--error-rate=1",), "proving", "golden probe"),
        (("--crash-after=0",), "proving", "illegal memory access"),
        (("--no-such-flag=1",), "starting", "exit code 2"),
    ],
)
def test_invariant_9_a_version_that_is_not_proven_gets_no_traffic_and_the_switch_says_why(
    stage: Stage, args: tuple[str, ...], stage_of_failure: str, said: str
) -> None:
    async def story(c: Cluster) -> None:
        version = f"bad{len(c.world.models['chat'].versions)}"
        load = c.load(15)
        before = len(c.seen)
        await c.register(version, *args, probe=Probe(expect="says"))
        code, out, err = await c.command("switch", "chat", version, "--wait", "--json")
        view = json.loads(out.splitlines()[-1])
        assert (code, view["status"]) == (1, "failed"), (out, err)
        assert view["stage"] in (stage_of_failure, "starting", "warming"), view
        assert said in view["reason"], view
        assert view["log_tail"], view
        await c.answered(load)
        history = await c.history()
        history.clean()
        assert {r.version for r in history.replies} == {"v1"}
        late = c.seen[before:]
        assert not [s for s in late if isinstance(s.recorded.event, InstanceReady | RouteChanged)]
        await c.until(lambda: not c.engine_pids(version), "its engine is gone")

    stage.run(story(stage.cluster))


@on_stage
async def test_weights_that_are_not_there_fail_the_switch_with_the_path(c: Cluster) -> None:
    missing = str(c.folder / "weights" / "missing")
    registry = DynamicModelRegistry(BaseRegistry(), c.client)
    await registry.register_model("chat", "nowhere", EngineSpec("fake", path=missing))
    await registry.register_model("chat", "outside", EngineSpec("fake", path="/etc"))
    for version, said in (("nowhere", missing), ("outside", "model root")):
        code, _, err = await c.command("switch", "chat", version, "--wait")
        assert code == 1
        assert said in err, err
        assert "Traceback" not in err
    assert c.world.models["chat"].active == "v1"


@on_stage
async def test_a_taken_port_is_named(c: Cluster) -> None:
    port = c.gateways["g1"].rpartition(":")[2]
    code, _, err = await _run("gateway", "--port", port, "--nats", c.nats_url)
    assert code == 1, err
    assert port in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [("controller",), ("worker",), ("gateway", "--port", "0"), ("models",)])
def test_without_nats_a_process_says_where_it_looked_and_ends(words: tuple[str, ...]) -> None:
    address = f"127.0.0.1:{free_port()}"
    code, out, err = asyncio.run(_run(*words, "--nats", f"nats://{address}"))
    assert code == 1, (out, err)
    assert address in err
    assert "turnout up" in err
    assert "Traceback" not in err


async def _run(*words: str, folder: str = "") -> tuple[int, str, str]:
    """Run a command that is to end by itself."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TURNOUT_")}
    env["PYTHONPATH"] = str(Path(turnout.__file__).parent.parent)
    with tempfile.TemporaryDirectory(prefix="to-") as here:
        process = await asyncio.create_subprocess_exec(
            *turnout_argv(*words), env=env, cwd=folder or here, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(30):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            out, err = await process.communicate()
            raise AssertionError(f"turnout {' '.join(words)} did not end: {out!r} {err!r}") from None
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.parametrize("how", ["changed", "emptied"])
def test_a_tampered_store_is_refused_and_serves_on(how: str) -> None:
    async def story(c: Cluster) -> None:
        await c.serving("v1", "v2")
        load = c.load(15)
        code, out, _ = await c.command("verify", "--json")
        assert (code, json.loads(out)["status"]) == (0, "whole")
        engines = c.engine_pids("v1"), c.engine_pids("v2")
        # when somebody changes what is stored, while the server is away
        c.nats.kill()
        (block,) = (c.nats.folder / "store").rglob("EVENTS/msgs/*.blk")
        data = block.read_bytes()
        changed = data.replace(b'"version":"v1"', b'"version":"v9"', 1)
        assert changed != data
        block.write_bytes(changed if how == "changed" else b"")
        await c.nats.start()
        # then the running controller ends, and no new one goes on from what is left
        await c.until(lambda: not c.processes["c1"].alive, "the controller has ended")
        assert c.processes["c1"].poll() == 1
        await c.logged("c1", "the log was replaced", quoted=False)
        c.start("c1")
        await c.until(lambda: not c.processes["c1"].alive, "the controller has ended")
        assert c.processes["c1"].poll() == 1
        await c.logged("c1", "restore the store folder from a backup", quoted=False)
        code, out, err = await c.command("verify", "--json")
        assert (code, json.loads(out)["status"]) == (1, "broken"), (out, err)
        # and requests go on, by the same engines
        await c.answered(load)
        await load.stop()
        assert {r.outcome for r in load.replies} == {"ok"}
        assert (c.engine_pids("v1"), c.engine_pids("v2")) == engines
        c.lost.clear()

    alone(lambda: Cluster(base=SMALL), story)
