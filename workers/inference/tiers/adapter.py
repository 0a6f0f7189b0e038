"""Tier ``adapter``: LoRA versions of one base share one running engine, each under a name of its own.

The name is the version's and its files', so that it never names others (a reused name may answer from the old adapter's
cached prefixes, vllm#42125). The base itself is served under a name that no client knows, so that a request that names
no adapter fails loudly. The engine starts with its first adapter and ends with its last.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from turnout.core.fit import fit
from turnout.events.worker import KeptEngine
from turnout.workers.inference import control, courtesy, shape
from turnout.workers.inference.process import EngineProcess, Record, memory_bytes
from turnout.workers.inference.runner import Failure, Loaded
from turnout.workers.inference.starting import LoadFailed, Running

if TYPE_CHECKING:
    from collections.abc import Callable

    from turnout.workers.inference.runner import Keeper
    from turnout.workers.inference.starting import Planned, Starter

log = structlog.get_logger()

_BASE = "base"


class Bases:
    """Engines that adapters share, by the name of their files."""

    def __init__(self, starter: Starter, running: dict[str, Running], keeper: Keeper) -> None:
        """``running``: the worker's engines by instance; adapters stand there, their bases do not.

        ``keeper``: is told of the bases.
        """
        self._starter = starter
        self._keeper = keeper
        self._running = running
        self._bases: dict[str, Running] = {}
        self._starting: set[str] = set()

    @property
    def kept(self) -> tuple[KeptEngine, ...]:
        """All of them, as the control plane knows them."""
        return tuple(one.kept(name, _BASE) for name, one in self._bases.items() if not one.exited)

    @property
    def running(self) -> dict[str, Running]:
        """Those that have grown to their size, by name: what one that starts holds yet tells nothing."""
        return {name: one for name, one in self._bases.items() if name not in self._starting}

    def find(self, shape: str) -> tuple[str, Running] | None:
        """A running base of this shape, with its name."""
        found = ((name, one) for name, one in self._bases.items() if one.shape == shape and not one.exited)
        return next(found, None) if shape else None

    def adopt(self, record: Record, process: EngineProcess) -> None:
        """One that an earlier worker has started."""
        self._bases[record.instance] = Running.adopt(record, process)

    def adopted(self) -> None:
        """All records were read: a base whose adapters are gone may go, too."""
        used = {one.base for one in self._running.values()}
        for name, base in tuple(self._bases.items()):
            if name not in used and base.process is not None:
                base.process.signal(9)

    async def start(self, planned: Planned, progress: Callable[[str, str], None]) -> tuple[str, Running] | Failure:
        """Start a base and wait until it listens."""
        name = f"{_BASE}-{self._starter.clock.id()[:8]}"
        order = planned.order
        if order.into:  # it was admitted to share an engine that is gone meanwhile, not to start one
            expected = order.inspection.host_bytes if order.inspection is not None else 0
            fits = fit(order.engine, order.inspection)
            engine = KeptEngine(name, _BASE, fits, planned.spec.path, expected, order.device)
            if reason := await self._keeper.may_start(engine):
                return Failure("starting", f"the engine that it was to share is gone; another has no room: {reason}")
        own = self._starter.plan(msgspec.structs.replace(order, instance=name))  # its socket is the base's
        started = own if isinstance(own, Failure) else self._starter.start(name, own, courtesy.LOADING)
        if isinstance(started, Failure):
            return started
        assert started.process is not None  # noqa: S101  a base is always a process of this host
        started.source, started.was = planned.spec.path, "" if order.into else order.instance
        started.process.record = msgspec.structs.replace(
            started.process.record,
            role=_BASE,
            shape=started.shape,
            bound=started.bound,
            source=started.source,
            fit=started.fit,
            device=started.device,
        )
        self._starter.folder.write(started.process.record)
        self._bases[name] = started
        self._starting.add(name)
        self._keeper.changed()
        progress("starting", "")
        try:
            await self._starter.wait_listening(started, progress)
        except LoadFailed as e:
            del self._bases[name]
            self._starting.discard(name)
            self._keeper.changed()
            return await self._starter.fail(name, started, e.stage, e.reason)
        courtesy.restore(started.process.pid)
        return name, started

    async def attach(
        self, planned: Planned, name: str, base: Running, tier: str, progress: Callable[[str, str], None]
    ) -> Loaded | Failure:
        """Load the adapter into the base and prove it under its name."""
        starter, order = self._starter, planned.order
        began = starter.clock.monotonic()
        assert base.process is not None  # noqa: S101  as above
        # A version's name may be used again for other files: the engine's cached prefixes must not be theirs.
        content = order.inspection.digest if order.inspection else shape.stamp(planned.spec.adapter)
        served = f"{order.model}@{order.version}.{content[:8]}"
        if any(one.launch.model == served and one.base == name for one in self._running.values()):
            served = f"{served}.{order.instance}"  # another instance of the version has not gone yet
        progress("loading", f"adapter {served} into the engine of {Path(base.source).name}")
        launch = msgspec.structs.replace(
            base.launch, argv=(), model=served, probes=planned.launch.probes, fingerprint="", fills=False
        )
        record = msgspec.structs.replace(
            base.process.record,
            instance=order.instance,
            launch=launch,
            sequence=order.sequence,
            role="adapter",
            tier=tier,
            base=name,
            shape="",
            proven=False,
        )
        handle = EngineProcess.adopt(record, starter.folder)
        if handle is None:
            return Failure("loading", "the engine that it shares has ended")
        running = Running(launch, handle, base.bound, source=f"{order.model} {order.version}", base=name)
        self._running[order.instance] = running
        starter.folder.write(record)
        try:
            await control.load_adapter(launch.address, served, planned.spec.adapter, starter.proof_timeout_s)
            load_s = starter.clock.monotonic() - began
            progress("proving", "")
            verdict = await starter.prove(running, order)
        except (LoadFailed, control.ControlFailed) as e:
            stage = e.stage if isinstance(e, LoadFailed) else "loading"
            del self._running[order.instance]
            failure = starter.with_tail(name, Failure(stage, str(e)))
            await self.detach(order.instance, running)
            return failure
        probe_s = starter.clock.monotonic() - began - load_s
        self._starting.discard(name)
        size = _bytes(planned.spec.adapter)
        if tier == "cold":
            base.bytes = await asyncio.to_thread(memory_bytes, base.process.pid)
            base.process.record = msgspec.structs.replace(base.process.record, bytes=base.bytes)
            starter.folder.write(base.process.record)
        handle.record = msgspec.structs.replace(record, proven=True, load_s=load_s, probe_s=probe_s, bytes=size)
        starter.folder.write(handle.record)
        return Loaded(launch.address, load_s, probe_s, size, verdict.fingerprint, tier, served=served, base=name)

    async def detach(self, instance: str, running: Running) -> None:
        """Take the adapter away; what runs on it goes on to its end. The last one takes the engine along."""
        process = running.process
        assert process is not None  # noqa: S101  as above
        if not process.exited:
            try:
                await control.unload_adapter(running.launch.address, running.launch.model, 10.0)
            except control.ControlFailed as e:
                log.warning("adapter_stays", instance=instance, reason=str(e))
        process.release()
        self._starter.folder.forget(instance)
        if not any(one.base == running.base for one in self._running.values()):
            await self.end(running.base)

    async def end(self, name: str) -> None:
        """End a base, with whatever runs on it."""
        base = self._bases.pop(name, None)
        self._starting.discard(name)
        if base is not None and base.process is not None:
            await base.process.end(base.launch.grace_s, self._starter.clock)
            self._starter.folder.forget(name)
            self._keeper.changed()
            log.info("base_engine_stopped", base=name)

    def release(self) -> None:
        """Let go of them; they run on."""
        for base in self._bases.values():
            if base.process is not None:
                base.process.release()
        self._bases.clear()


class Adapter:
    """Loads an adapter into a base that runs."""

    name = "adapter"

    def __init__(self, bases: Bases) -> None:
        self._bases = bases

    def unfit(self, planned: Planned) -> str:
        """Its base must run."""
        if not planned.spec.adapter:
            return "it is no adapter"
        return "" if self._bases.find(planned.shape) else "no engine of its base runs"

    def source(self, planned: Planned) -> str:
        """The base."""
        return planned.spec.path

    async def load(self, planned: Planned, progress: Callable[[str, str], None]) -> Loaded | Failure:
        """See the protocol."""
        found = self._bases.find(planned.shape)
        if found is None:
            return Failure("loading", "the engine of its base is gone")
        return await self._bases.attach(planned, *found, self.name, progress)


class AdapterCold:
    """Starts the base for its first adapter."""

    name = "cold"

    def __init__(self, starter: Starter, bases: Bases) -> None:
        self._starter = starter
        self._bases = bases

    def unfit(self, planned: Planned) -> str:
        """Another base would not help an adapter that has failed on one."""
        if not planned.spec.adapter:
            return "it is no adapter"
        return "an engine of its base runs already" if self._bases.find(planned.shape) else ""

    def source(self, planned: Planned) -> str:
        """Nothing."""
        return ""

    async def load(self, planned: Planned, progress: Callable[[str, str], None]) -> Loaded | Failure:
        """See the protocol."""
        began = self._starter.clock.monotonic()
        started = await self._bases.start(planned, progress)
        if isinstance(started, Failure):
            return started
        start_s = self._starter.clock.monotonic() - began
        loaded = await self._bases.attach(planned, *started, self.name, progress)
        return msgspec.structs.replace(loaded, load_s=start_s + loaded.load_s) if isinstance(loaded, Loaded) else loaded


def _bytes(folder: str) -> int:
    """What an adapter adds to its engine: about as much as its files have."""
    return sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file())
