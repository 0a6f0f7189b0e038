"""The fake engine as a process: what real clients see of it, sound and unsound."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import turnout
from turnout.workers.inference import client, quiet

pytestmark = pytest.mark.process

Start = Callable[..., "Engine"]
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


class Engine:
    """One fake engine; its own process group is killed at the end."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.socket = folder / "e.sock"
        self.address = f"unix:{self.socket}"
        env = {**os.environ, "PYTHONPATH": str(Path(turnout.__file__).parent.parent)}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "turnout.workers.inference.engines.fake_server",
                "--socket",
                str(self.socket),
                *args,
            ],
            env=env,
            start_new_session=True,
            stderr=subprocess.PIPE,
        )

    async def up(self) -> Engine:
        async with asyncio.timeout(20):
            while True:
                try:
                    await client.ask(self.address, "/health", timeout_s=5)
                except client.Unreachable:
                    assert self.process.poll() is None, self.log()
                    await asyncio.sleep(0.01)
                else:
                    return self

    async def post(self, path: str, **fields: object) -> client.Reply:
        body = msgspec.json.encode({"model": "", **fields})
        return await client.ask(self.address, path, method="POST", body=body, timeout_s=5)

    async def get(self, path: str) -> client.Reply:
        return await client.ask(self.address, path, timeout_s=5)

    def log(self) -> str:
        """Its output, once it has ended."""
        return self.process.communicate(timeout=20)[1].decode()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[Engine] = []
    with tempfile.TemporaryDirectory(prefix="tf-") as folder:

        def make(*args: str) -> Engine:
            engines.append(Engine(Path(tempfile.mkdtemp(dir=folder)), *args))
            return engines[-1]

        yield make
        for engine in engines:
            engine.kill()


def events(reply: client.Reply) -> list[Any]:
    """Events of a stream, the last one as text."""
    data = [line[6:] for line in reply.body.decode().split("\n") if line.startswith("data: ")]
    return [msgspec.json.decode(d) if d != "[DONE]" else d for d in data]


def test_a_completion_names_the_version(runner: asyncio.Runner, start: Start) -> None:
    async def test() -> None:
        engine = await start("--version=v2", "--model=chat").up()
        reply = await engine.post(COMPLETIONS, model="chat", prompt="x", max_tokens=5, logprobs=1)
        answer = msgspec.json.decode(reply.body)
        assert answer["system_fingerprint"] == "v2"
        assert answer["model"] == "chat"
        assert answer["choices"][0]["text"].startswith("v2 says:")
        assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 5
        assert int(reply.headers["content-length"]) == len(reply.body)

    runner.run(test())


@pytest.mark.parametrize("delays", [(), ("--first-token-ms=2", "--token-ms=1")])
def test_a_chat_stream_has_role_content_finish_usage_and_done(
    runner: asyncio.Runner, start: Start, delays: tuple[str, ...]
) -> None:
    async def test() -> None:
        engine = await start("--version=v2", *delays).up()
        reply = await engine.post(CHAT, messages=[], stream=True, max_tokens=4, stream_options={"include_usage": True})
        assert "text/event-stream" in reply.headers["content-type"]
        *chunks, usage, done = events(reply)
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "v2 says: a"
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 5 + ["stop"]
        assert usage["usage"]["completion_tokens"] == 4
        assert done == "[DONE]"

    runner.run(test())


def test_the_other_endpoints_answer(runner: asyncio.Runner, start: Start) -> None:
    async def test() -> None:
        engine = await start("--version=v2", "--model=chat").up()
        names = [m["id"] for m in msgspec.json.decode((await engine.get("/v1/models")).body)["data"]]
        assert names == ["chat", "chat@v2"]
        response = msgspec.json.decode((await engine.post("/v1/responses", input="x")).body)
        assert response["output"][0]["content"][0]["text"].startswith("v2 says:")
        stream = events(await engine.post("/v1/responses", input="x", stream=True, max_tokens=3))
        assert [e["type"] for e in stream] == [
            *("response.created", "response.output_text.delta", "response.output_text.delta"),
            *("response.output_text.delta", "response.completed"),
        ]
        vector = msgspec.json.decode((await engine.post("/v1/embeddings", input="x")).body)
        assert len(vector["data"][0]["embedding"]) == 8
        sound = await engine.post("/v1/audio/speech", input="x")
        assert (sound.headers["content-type"], sound.body[:4]) == ("audio/wav", b"RIFF")
        form = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n\0\xff\r\n--b--\r\n'
        text = await client.ask(
            engine.address,
            "/v1/audio/transcriptions",
            method="POST",
            body=form,
            timeout_s=5,
            kind="multipart/form-data; boundary=b",
        )
        assert msgspec.json.decode(text.body)["bytes"] == len(form)
        assert (await engine.post(COMPLETIONS, model="other")).status == 404
        assert (await engine.get("/nowhere")).status == 404
        assert (await client.ask(engine.address, COMPLETIONS, method="POST", body=b"{", timeout_s=5)).status == 400

    runner.run(test())


@pytest.mark.parametrize(
    ("flag", "status", "sign"),
    [
        ("--error-rate=1", 500, b"EngineCore"),
        ("--nan", 400, b"not JSON compliant"),
        ("--empty", 200, b'"text":""'),
        ("--loop", 200, b"!!!!"),
        ("--abort-rate=1", 200, b'"finish_reason":"abort"'),
        ("--stream-error-rate=1", 500, b"EngineCore"),
    ],
)
def test_it_misbehaves_as_told_after_its_sound_requests(
    runner: asyncio.Runner, start: Start, flag: str, status: int, sign: bytes
) -> None:
    async def test() -> None:
        engine = await start(flag, "--sound-first=1").up()
        sound = await engine.post(COMPLETIONS, prompt="x", logprobs=1)
        assert (sound.status, b"says" in sound.body) == (200, True)
        bad = await engine.post(COMPLETIONS, prompt="x", logprobs=1)
        assert bad.status == status
        assert sign in bad.body

    runner.run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_has_an_id_of_its_own(runner: asyncio.Runner, start: Start, stream: bool) -> None:
    async def test() -> None:
        engine = await start("--version=v2").up()
        bodies = [(await engine.post(CHAT, stream=stream)).body for _ in range(2)]
        assert [b'"chatcmpl-v2-%08d"' % n in body for n, body in enumerate(bodies, 1)] == [True, True]
        assert bodies[0] != bodies[1]

    runner.run(test())


def test_garbage_does_not_name_the_version(runner: asyncio.Runner, start: Start) -> None:
    async def test() -> None:
        reply = await (await start("--garbage", "--version=v2").up()).post(COMPLETIONS, prompt="x")
        assert b"v2 says" not in reply.body

    runner.run(test())


def test_a_stream_breaks_with_an_error_inside_it(runner: asyncio.Runner, start: Start) -> None:
    async def test() -> None:
        engine = await start("--stream-error-rate=1").up()
        reply = await engine.post(CHAT, stream=True, max_tokens=8)
        *_, error, done = events(reply)
        assert reply.status == 200
        assert error["error"]["code"] == 500
        assert done == "[DONE]"

    runner.run(test())


def test_the_same_seed_fails_the_same_requests(runner: asyncio.Runner, start: Start) -> None:
    async def statuses(seed: str) -> list[int]:
        engine = await start("--error-rate=0.5", f"--seed={seed}").up()
        return [(await engine.post(COMPLETIONS, prompt="x")).status for _ in range(16)]

    async def test() -> None:
        first = await statuses("7")
        assert set(first) == {200, 500}
        assert await statuses("7") == first
        assert await statuses("8") != first

    runner.run(test())


def test_it_crashes_in_the_middle_of_a_stream(runner: asyncio.Runner, start: Start) -> None:
    async def test() -> None:
        engine = await start("--crash-after=1", "--token-ms=1").up()
        await engine.post(COMPLETIONS, prompt="x")
        with pytest.raises(client.Unreachable, match="middle of the answer"):
            await engine.post(CHAT, stream=True)
        assert "illegal memory access" in engine.log()
        assert engine.process.returncode == 1

    runner.run(test())


def test_it_hangs_while_its_health_is_fine(runner: asyncio.Runner, start: Start) -> None:
    async def test() -> None:
        engine = await start("--hang-after=0").up()
        with pytest.raises(client.Unreachable, match="within"):
            await client.ask(engine.address, CHAT, method="POST", body=b'{"stream":true}', timeout_s=0.2)
        assert (await engine.get("/health")).status == 200

    runner.run(test())


def test_running_requests_are_counted_and_a_client_that_leaves_is_forgotten(
    runner: asyncio.Runner, start: Start
) -> None:
    async def wait_running(engine: Engine, count: float) -> None:
        found = -1.0
        async with asyncio.timeout(20):
            while found != count:
                text = (await engine.get("/metrics")).body.decode()
                found = quiet.total(text, ("vllm:num_requests_running",))

    async def test() -> None:
        engine = await start("--first-token-ms=100000").up()
        await wait_running(engine, 0)
        asking = asyncio.create_task(client.ask(engine.address, CHAT, method="POST", body=b"{}", timeout_s=60))
        await wait_running(engine, 1)
        asking.cancel()
        await wait_running(engine, 0)

    runner.run(test())


def test_sigterm_lets_a_stream_finish_and_refuses_new_connections(runner: asyncio.Runner, start: Start) -> None:
    async def test() -> None:
        engine = await start("--token-ms=20", "--tokens=20").up()
        reader, writer = await asyncio.open_unix_connection(str(engine.socket))
        body = b'{"stream":true}'
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        await reader.readuntil(b"says")
        engine.process.send_signal(signal.SIGTERM)
        rest = await asyncio.wait_for(reader.read(), 20)
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()
        assert engine.process.wait(20) == 0
        with pytest.raises(client.Unreachable) as refused:
            await engine.get("/health")
        assert refused.value.refused

    runner.run(test())


def test_requests_on_one_connection_are_answered_in_order(runner: asyncio.Runner, start: Start) -> None:
    async def test() -> None:
        engine = await start("--first-token-ms=5", "--version=v3").up()
        reader, writer = await asyncio.open_unix_connection(str(engine.socket))
        body = b'{"max_tokens":1}'
        one = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        writer.write(one * 3 + b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        everything = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        assert [everything.count(b"cmpl-v3-%08d" % n) for n in (1, 2, 3)] == [1, 1, 1]
        assert (
            everything.index(b"cmpl-v3-00000001")
            < everything.index(b"cmpl-v3-00000003")
            < everything.index(b'"version"')
        )

    runner.run(test())
