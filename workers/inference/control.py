"""An engine's operation endpoints: fill, rename, adapters, sleep. Knows no tier and no process.

They are vLLM's (dev mode) and turnout's own hand inside it (engines/vllm_side); the fake engine copies both. An error
of any of them leaves an engine of which nothing is known: its caller kills it and never asks again.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec

from turnout.workers.inference import client


class ControlFailed(Exception):
    """The engine did not do it; the message says what it answered."""


async def pause(address: str, timeout_s: float) -> None:
    """Let running requests end, hold new ones, and forget every cached prefix: it belongs to the weights before."""
    await _post(address, "/pause?mode=wait", {}, timeout_s)


async def resume(address: str, timeout_s: float) -> None:
    """Take requests again."""
    await _post(address, "/resume", {}, timeout_s)


async def expect_files(address: str, timeout_s: float) -> None:
    """An engine that was started without weights takes them from files from now on."""
    overrides = {"load_config": {"load_format": "auto"}}
    await _call(address, "update_config", {"overrides": overrides}, timeout_s)


async def fill(address: str, path: str, timeout_s: float, *, repack: bool = True) -> None:
    """Load the weights at ``path`` in place; ``repack`` makes tied output heads anew (see engines/vllm_side).

    Raises:
        ControlFailed: it answered with an error, or the files lack a weight.
    """
    for said in await _call(address, "turnout_fill", {"path": path, "repack": repack}, timeout_s):
        if said.get("fault"):
            raise ControlFailed(str(said["fault"]))


async def compare(address: str, path: str, timeout_s: float) -> None:
    """Compare what the engine computes with the files at ``path``.

    Raises:
        ControlFailed: something differs; the message names it.
    """
    for said in await _call(address, "turnout_proof", {"path": path}, timeout_s):
        if said.get("fault"):
            raise ControlFailed(str(said["fault"]))


async def rename(address: str, names: tuple[str, ...], fingerprint: str, timeout_s: float) -> None:
    """Give it the served names and the fingerprint of the version that it holds now."""
    await _post(address, "/turnout/name", {"names": names, "fingerprint": fingerprint}, timeout_s)


async def load_adapter(address: str, name: str, path: str, timeout_s: float) -> None:
    """Serve an adapter under a name that was never used before."""
    await _post(address, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, timeout_s)


async def unload_adapter(address: str, name: str, timeout_s: float) -> None:
    """Forget the adapter's name; requests that run on it go on to their end."""
    await _post(address, "/v1/unload_lora_adapter", {"lora_name": name}, timeout_s)


async def sleep(address: str, level: int, timeout_s: float) -> None:
    """Free the device: level 1 keeps the weights in host memory, 2 drops them.

    Raises:
        ControlFailed: it answered with an error, or does not say that it sleeps.
    """
    await _post(address, f"/sleep?level={level}&mode=wait", {}, timeout_s)
    reply = await _ask(address, "/is_sleeping", "GET", b"", timeout_s)
    if msgspec.json.decode(reply.body) != {"is_sleeping": True}:
        raise ControlFailed("it answered 200 to /sleep and does not sleep")


async def wake(address: str, level: int, path: str, timeout_s: float) -> None:
    """Wake it. After level 2 the weights are read again before the cache is made: without that it answers garbage.

    Raises:
        ControlFailed: it answered with an error, or not everything is awake.
    """
    await _post(address, "/wake_up?tags=weights", {}, timeout_s)
    if level > 1:
        await fill(address, path, timeout_s)
    said = await _post(address, "/wake_up?tags=kv_cache", {}, timeout_s)
    if said.get("status") != "awake":
        raise ControlFailed(f"not everything is awake: {said}")


async def _call(address: str, method: str, kwargs: dict[str, object], timeout_s: float) -> list[dict[str, Any]]:
    """Call a method of every one of its workers; what each of them answers."""
    said = await _post(address, "/collective_rpc", {"method": method, "kwargs": kwargs}, timeout_s)
    results = cast("list[dict[str, Any] | None]", said.get("results") or [])
    return [result or {} for result in results]


async def _post(address: str, path: str, body: dict[str, object], timeout_s: float) -> dict[str, Any]:
    reply = await _ask(address, path, "POST", msgspec.json.encode(body), timeout_s)
    try:
        said: object = msgspec.json.decode(reply.body)
    except msgspec.DecodeError:
        return {}  # some answer in plain words
    return cast("dict[str, Any]", said) if isinstance(said, dict) else {}


async def _ask(address: str, path: str, method: str, body: bytes, timeout_s: float) -> client.Reply:
    try:
        reply = await client.ask(address, path, method=method, body=body, timeout_s=timeout_s)
    except client.Unreachable as e:
        raise ControlFailed(str(e)) from e
    if reply.status != 200:
        text = " ".join(reply.body[:300].decode("utf-8", "replace").split())
        raise ControlFailed(f"{path.partition('?')[0]} answered {reply.status}: {text}")
    return reply
