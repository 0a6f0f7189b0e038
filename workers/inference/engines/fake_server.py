"""A fake engine: an OpenAI-compatible server without a model, for tests, demos and benches.

It speaks HTTP at protocol level on uvloop and httptools, so that it is not the bottleneck when a gateway is measured,
and imports little, so that it starts fast. It misbehaves on request, in the ways that real engines were seen to. Knows
nothing of turnout's events and commands.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, cast

import httptools
import msgspec
import uvloop

from turnout.workers.clock import SystemClock
from turnout.workers.inference.engines import fake_hand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

WORDS = (
    *("a", "steady", "stream", "of", "plain", "words", "that", "no", "model", "wrote", "but", "every", "client"),
    *("can", "count", "and", "compare", "with", "what", "came", "before"),
)
GARBAGE = ("Ground", "setattr", "amiliar", "}]);", "ÃƒÂ", "orum", "imir", "isim", "\\\\x", "Ltd", "zzq", "0xff", "ège")
#: What vLLM says in a 500 once its engine process has died; a gateway tells it from an error of one request.
DEAD = "EngineCore encountered an issue"
CUT_AT = 0.5  # a stream that breaks does so after this share of its tokens

_encode = msgspec.json.encode


class Settings(msgspec.Struct, frozen=True):
    """What the flags say; see :func:`parse`."""

    socket: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    model: str = ""
    version: str = "v1"
    load_s: float = 0.0
    first_token_s: float = 0.0
    token_s: float = 0.0
    tokens: int = 16
    error_rate: float = 0.0
    stream_error_rate: float = 0.0
    abort_rate: float = 0.0
    garbage: bool = False
    loop: bool = False
    empty: bool = False
    nan: bool = False
    sound_first: int = 0
    crash_after: int = -1
    crash_at_load: bool = False
    hang_after: int = -1
    deaf_after: int = -1
    error_says: str = DEAD
    hang_at_load: bool = False
    memory_mb: int = 0
    seed: int = 0
    weights: str | None = None
    adapters: bool = False
    wake_fails: bool = False
    keeps_prefixes: bool = False


class Ask(msgspec.Struct):
    """The fields of a request that change the answer. A prompt may be text, texts or token ids."""

    model: str = ""
    stream: bool | None = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    logprobs: bool | int | None = None
    stream_options: dict[str, bool | None] | None = None
    prompt: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")

    @property
    def texts(self) -> int:
        """How many texts are to be continued: a list of them asks for that many choices."""
        raw = bytes(self.prompt).lstrip()
        if not raw.startswith(b"["):
            return 1
        found = msgspec.json.decode(raw, type=list[object])
        return max(1, sum(1 for one in found if isinstance(one, str)))


class Draw:
    """Repeatable numbers in [0, 1) from a seed (SplitMix64, Steele et al. 2014): a run can be done again exactly."""

    def __init__(self, seed: int) -> None:
        self._state = seed & 0xFFFFFFFFFFFFFFFF

    def __call__(self) -> float:
        """The next number."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return ((z ^ (z >> 31)) >> 11) / (1 << 53)


class Plan(msgspec.Struct, frozen=True):
    """One answer as it shall go out: its tokens, how it ends, and whether it breaks before that."""

    tokens: tuple[str, ...]
    finish: str = "stop"
    broken: bool = False
    crash: bool = False


class Model:
    """What the fake engine says, how often it has been asked, and what it does wrong next."""

    def __init__(self, settings: Settings, created: int) -> None:
        self.settings = settings
        self.created = created
        self.name = settings.model or "fake"
        self.names = (self.name, f"{self.name}@{settings.version}")
        self.running = 0
        self.answering: list[str] = []  # the names that running requests were sent under
        self.asked = self.heard = 0
        self.finished: dict[str, int] = {}
        self.generated = 0
        self._draw = Draw(settings.seed)
        self._sound: dict[int, Plan] = {}
        s = settings
        self.hand = (
            None
            if s.weights is None
            else fake_hand.Hand(
                s.weights,
                self.name,
                adapters=s.adapters,
                wake_fails=s.wake_fails,
                keeps_prefixes=s.keeps_prefixes,
            )
        )
        self._ballast = bytearray(b"\x01") * (settings.memory_mb << 20)
        self._faulty = bool(
            settings.error_rate
            or settings.stream_error_rate
            or settings.abort_rate
            or settings.garbage
            or settings.loop
            or settings.empty
            or settings.nan
            or settings.crash_after >= 0
        )

    def sound(self, count: int) -> Plan:
        """A good answer: the version comes first, so that every answer names it."""
        plan = self._sound.get(count)
        if plan is None:
            words = (" " + WORDS[n % len(WORDS)] for n in range(count - 3))
            plan = self._sound[count] = Plan((self.settings.version, " says", ":", *words)[:count])
        return plan

    def rename(self, name: str, version: str) -> None:
        """It serves another version from now on."""
        self.settings = msgspec.structs.replace(self.settings, model=name, version=version)
        self.name = name
        self.names = (name, f"{name}@{version}")
        self._sound.clear()

    def logprob(self, name: str) -> float:
        """Of every token: tells weights apart where there are any."""
        return -0.25 if self.hand is None else self.hand.logprob(name)

    def recall(self, ask: Ask) -> tuple[float, int]:
        """The same for one prompt, and how much of it was cached; see ``Hand.recall``."""
        return (self.logprob(ask.model), 0) if self.hand is None else self.hand.recall(ask.model, bytes(ask.prompt))

    def is_sound(self, plan: Plan) -> bool:
        """Whether it is a good answer, the same for every request of its length."""
        return self._sound.get(len(plan.tokens)) is plan

    def plan(self, count: int, texts: int = 1) -> Plan | None:
        """What the next request gets; None means an error answer.

        One with several texts is how a worker compares engines: it is not counted, and no planned fault meets it.
        """
        self.heard += 1
        self.asked += texts == 1
        if self.hand is not None and self.hand.garbage:  # asleep at level 2, woken without its weights
            return Plan(("!",) * count, finish="length")
        if self.hand is not None and self.hand.poisoned:
            return Plan(())
        if not self._faulty or texts > 1:
            return self.sound(count)
        s, n = self.settings, self.asked
        if 0 <= s.crash_after < n:
            return Plan(self.sound(count).tokens, crash=True)
        if n <= s.sound_first:
            return self.sound(count)
        if s.error_rate and self._draw() < s.error_rate:
            return None
        if s.empty or s.nan:
            return Plan(())
        if s.loop:
            return Plan(("!",) * count, finish="length")  # broken weights never come to an end by themselves
        if s.garbage:
            salad = tuple(GARBAGE[int(self._draw() * len(GARBAGE))] for _ in range(count))
            return Plan(salad, finish="length")
        if s.stream_error_rate and self._draw() < s.stream_error_rate:
            return Plan(self.sound(count).tokens, broken=True)
        if s.abort_rate and self._draw() < s.abort_rate:
            return Plan(self.sound(max(1, count // 2)).tokens, finish="abort")
        return self.sound(count)

    def is_deaf(self) -> bool:
        """Whether no connection is taken any more."""
        return 0 <= self.settings.deaf_after <= self.heard

    def hangs(self) -> bool:
        """Whether the request that was counted last gets no byte for ever."""
        return 0 <= self.settings.hang_after < self.asked

    def is_nan(self) -> bool:
        """Whether the weights are NaN by now: logprobs can't be written as JSON."""
        if self.hand is not None and self.hand.nan:
            return True
        return self.settings.nan and self.asked > self.settings.sound_first

    def ended(self, finish: str, tokens: int) -> None:
        """Count a finished answer, for /metrics."""
        self.finished[finish] = self.finished.get(finish, 0) + 1
        self.generated += tokens

    def _adapter_metrics(self) -> tuple[str, ...]:
        """Which adapters run now, in vLLM's words."""
        if self.hand is None or not self.settings.adapters:
            return ()
        names = ",".join(sorted({name for name in self.answering if name in self.hand.adapters}))
        return (
            "# TYPE vllm:lora_requests_info gauge",
            f'vllm:lora_requests_info{{max_lora="4",running_lora_adapters="{names}",waiting_lora_adapters=""}} 1.0',
        )

    def metrics(self) -> bytes:
        """The figures that vLLM shows under the same names."""
        label = f'engine="0",model_name="{self.name}"'
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{{{label}}} {float(self.running)}",
            "# TYPE vllm:num_requests_waiting gauge",
            f"vllm:num_requests_waiting{{{label}}} 0.0",
            *self._adapter_metrics(),
            "# TYPE vllm:generation_tokens_total counter",
            f"vllm:generation_tokens_total{{{label}}} {float(self.generated)}",
            "# TYPE vllm:request_success_total counter",
            *(
                f'vllm:request_success_total{{{label},finished_reason="{why}"}} {float(count)}'
                for why, count in self.finished.items()
            ),
        ]
        return ("\n".join(lines) + "\n").encode()


class Shape(ABC):
    """One OpenAI endpoint that generates text: how an answer, and each piece of a stream, is written.

    ``opening``: events before the first token's; ``early``: so many of them don't wait for it. As in vLLM, whose head
    of a stream goes out at once, and the role of a chat with the first token.
    """

    prefix = ""
    opening = early = 0

    def __init__(self, model: Model) -> None:
        self.model = model

    def head(self, ask: Ask) -> dict[str, object]:
        """Who answers: an adapter under its own name, everything else under the engine's."""
        model = self.model
        adapter = model.hand is not None and ask.model in model.hand.adapters
        name = ask.model if adapter else model.name
        return {"created": model.created, "model": name, "system_fingerprint": model.settings.version}

    @abstractmethod
    def whole(self, id: str, ask: Ask, plan: Plan) -> bytes:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def pieces(self, id: str, ask: Ask, plan: Plan) -> Iterator[bytes]:
        """The events of a stream, ``data:`` and blank line included; the first ``opening`` ones carry no token."""

    @staticmethod
    def usage(plan: Plan, cached: int = 0) -> dict[str, object]:
        """Counts of tokens; the prompt counts as 8, as nothing reads it, and ``cached`` of it where there are any."""
        details = {"prompt_tokens_details": {"cached_tokens": cached}} if cached else {}
        count = len(plan.tokens)
        return {"prompt_tokens": 8, "completion_tokens": count, "total_tokens": 8 + count, **details}


class Completions(Shape):
    """``/v1/completions``."""

    prefix = "cmpl-"

    def whole(self, id: str, ask: Ask, plan: Plan) -> bytes:
        """One choice with text, and logprobs where asked for."""
        value, cached = self.model.recall(ask)
        logprobs = {
            "text_offset": (),
            "tokens": plan.tokens,
            "token_logprobs": [value] * len(plan.tokens),
            "top_logprobs": [{token: value} for token in plan.tokens],
        }
        choices = [
            {
                "index": n,
                "text": "".join(plan.tokens),
                "logprobs": logprobs if ask.logprobs else None,
                "finish_reason": plan.finish,
            }
            for n in range(ask.texts)
        ]
        return _encode(
            {
                "id": id,
                "object": "text_completion",
                **self.head(ask),
                "choices": choices,
                "usage": self.usage(plan, cached),
            }
        )

    def pieces(self, id: str, ask: Ask, plan: Plan) -> Iterator[bytes]:
        """One event for each token; the finish reason rides on the last, as vLLM does it."""
        head = {"id": id, "object": "text_completion", **self.head(ask)}
        last = len(plan.tokens) - 1
        for n, token in enumerate(plan.tokens):
            choice = {"index": 0, "text": token, "logprobs": None, "finish_reason": plan.finish if n == last else None}
            yield b"data: " + _encode({**head, "choices": [choice]}) + b"\n\n"
        if last < 0:
            choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": plan.finish}
            yield b"data: " + _encode({**head, "choices": [choice]}) + b"\n\n"
        if ask.stream_options and ask.stream_options.get("include_usage"):
            yield b"data: " + _encode({**head, "choices": [], "usage": self.usage(plan)}) + b"\n\n"


class Chat(Shape):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl-"
    opening = 1

    def whole(self, id: str, ask: Ask, plan: Plan) -> bytes:
        """One choice with the assistant's message."""
        message = {"role": "assistant", "content": "".join(plan.tokens)}
        logprobs = {
            "content": [
                {"token": t, "logprob": self.model.logprob(ask.model), "bytes": None, "top_logprobs": ()}
                for t in plan.tokens
            ]
        }
        choice = {
            "index": 0,
            "message": message,
            "logprobs": logprobs if ask.logprobs else None,
            "finish_reason": plan.finish,
        }
        return _encode(
            {"id": id, "object": "chat.completion", **self.head(ask), "choices": [choice], "usage": self.usage(plan)}
        )

    def pieces(self, id: str, ask: Ask, plan: Plan) -> Iterator[bytes]:
        """The role, one event for each token, the finish reason, the usage where asked for."""
        head = {"id": id, "object": "chat.completion.chunk", **self.head(ask)}
        yield _chunk(head, {"role": "assistant", "content": ""}, None)
        for token in plan.tokens:
            yield _chunk(head, {"content": token}, None)
        yield _chunk(head, {}, plan.finish)
        if ask.stream_options and ask.stream_options.get("include_usage"):
            yield b"data: " + _encode({**head, "choices": [], "usage": self.usage(plan)}) + b"\n\n"


def _chunk(head: Mapping[str, object], delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return b"data: " + _encode({**head, "choices": [choice]}) + b"\n\n"


class Responses(Shape):
    """``/v1/responses``, text only."""

    prefix = "resp_"
    opening = early = 1

    def _response(self, id: str, plan: Plan, status: str) -> dict[str, object]:
        text = {"type": "output_text", "text": "".join(plan.tokens), "annotations": ()}
        output = [{"type": "message", "id": "msg_1", "role": "assistant", "status": status, "content": [text]}]
        count = len(plan.tokens)
        return {
            "id": id,
            "object": "response",
            "created_at": self.model.created,
            "model": self.model.name,
            "system_fingerprint": self.model.settings.version,
            "status": status,
            "output": output if status == "completed" else (),
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": (),
            "usage": {"input_tokens": 8, "output_tokens": count, "total_tokens": 8 + count},
        }

    def whole(self, id: str, ask: Ask, plan: Plan) -> bytes:
        """One output message."""
        return _encode(self._response(id, plan, "completed"))

    def pieces(self, id: str, ask: Ask, plan: Plan) -> Iterator[bytes]:
        """Created, one delta for each token, completed."""
        yield _named({"type": "response.created", "response": self._response(id, plan, "in_progress")}, 0)
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        for n, token in enumerate(plan.tokens):
            yield _named({"type": "response.output_text.delta", **place, "delta": token, "logprobs": []}, n + 1)
        done = {"type": "response.completed", "response": self._response(id, plan, "completed")}
        yield _named(done, len(plan.tokens) + 1)


def _named(event: Mapping[str, object], number: int) -> bytes:
    data = _encode({**event, "sequence_number": number})
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + data + b"\n\n"


_REASONS = {
    200: b"OK",
    400: b"Bad Request",
    404: b"Not Found",
    405: b"Method Not Allowed",
    500: b"Internal Server Error",
}
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: fake\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_NUMBER = b"#number#"  # as long as what takes its place
_DONE = b"data: [DONE]\n\n"
_END = b"0\r\n\r\n"
_DEV_PATHS = frozenset(("/collective_rpc", "/sleep", "/wake_up", "/pause", "/resume", "/tokenize", "/server_info"))


def _framed(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def _plain(status: int, body: bytes, kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 %d %b\r\nserver: fake\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (
        status,
        _REASONS[status],
        kind,
        len(body),
        body,
    )


def _error(status: int, message: str, kind: str) -> bytes:
    return _plain(status, _encode({"error": {"message": message, "type": kind, "param": None, "code": status}}))


class Stream:
    """One running streamed answer: writes a piece when its time has come and the client can take it."""

    def __init__(self, http: Http, id: str, ask: Ask, plan: Plan, shape: Shape) -> None:
        self._http = http
        self._plan = plan
        self._shape = shape
        self._settings = http.server.model.settings
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._pieces = self._script(id, ask)
        self._opening = shape.opening - shape.early

    def _script(self, id: str, ask: Ask) -> Iterator[bytes]:
        """The events in order, up to where the stream is to break."""
        plan = self._plan
        cut = self._shape.opening + int(len(plan.tokens) * CUT_AT) if plan.broken or plan.crash else -1
        for n, piece in enumerate(self._shape.pieces(id, ask, plan)):
            if n == cut:
                break
            yield piece
        if plan.broken:
            failure = {"message": DEAD, "type": "InternalServerError", "code": 500}
            yield b"data: " + _encode({"error": failure}) + b"\n\n"
        if type(self._shape) is not Responses:
            yield _DONE

    def whole(self) -> bytes:
        """All of it, where nothing is to wait."""
        return _STREAM_HEAD + b"".join(map(_framed, self._pieces)) + _END

    def start(self) -> None:
        """Send the head now and the first token when it is due."""
        s, http = self._settings, self._http
        http.transport.write(_STREAM_HEAD + self._next(self._shape.early))
        self._due = http.server.loop.time() + s.first_token_s
        self._timer = http.server.loop.call_at(self._due, self.send)

    def _next(self, count: int) -> bytes:
        return b"".join(_framed(next(self._pieces)) for _ in range(count))

    def send(self) -> None:
        """Write the next piece; called by the timer, and again when a slow reader has caught up."""
        http = self._http
        if http.paused:
            self._timer = None
            return
        if self._opening:
            http.transport.write(self._next(self._opening))
            self._opening = 0
        piece = next(self._pieces, _DONE)
        if self._plan.crash and piece is _DONE:
            crash()
        if piece is _DONE or (type(self._shape) is Responses and b'"response.completed"' in piece[:80]):
            http.transport.write(_framed(piece) + _END)
            http.finish(self._plan.finish, len(self._plan.tokens))
            return
        http.transport.write(_framed(piece))
        self._due += self._settings.token_s
        self._timer = http.server.loop.call_at(self._due, self.send)

    def resume(self) -> None:
        """The client reads again."""
        if self._timer is None:
            self.send()

    def cancel(self) -> None:
        """The client is gone."""
        if self._timer is not None:
            self._timer.cancel()


class Server:
    """What the connections share."""

    SHAPES: ClassVar[dict[str, type[Shape]]] = {
        "/v1/completions": Completions,
        "/v1/chat/completions": Chat,
        "/v1/responses": Responses,
    }

    def __init__(self, model: Model, loop: asyncio.AbstractEventLoop) -> None:
        self.model = model
        self.loop = loop
        self.stopping = False
        self.connections: set[Http] = set()
        if model.hand is not None:
            model.hand.named = model.rename
        self.shapes = {path: shape(model) for path, shape in self.SHAPES.items()}
        self.decode = msgspec.json.Decoder(Ask).decode
        self.answers: dict[tuple[object, ...], bytes] = {}
        self.listening: asyncio.Server | None = None
        self.emptied: Callable[[], None] = lambda: None

    def close(self) -> None:
        """Take no connection any more. Idle ones close now, the rest when their answer is out."""
        self.stopping = True
        if self.listening is not None:
            self.listening.close()
        for http in tuple(self.connections):
            http.close_if_idle()

    def stop(self) -> None:
        """The process is to end."""
        self.close()
        self.gone()

    def gone(self) -> None:
        """A connection has ended."""
        if self.stopping and not self.connections:
            self.emptied()


class Http(asyncio.Protocol):
    """One client connection."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.paused = False
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._parser = httptools.HttpRequestParser(self)
        self._path = ""
        self._body: list[bytes] = []
        self._waiting: deque[tuple[str, str, str, bytes, bool]] = deque()
        self._busy = False
        self._counted = False
        self._under = ""
        self._keep = True
        self._answer: Stream | asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        self.transport = cast("asyncio.Transport", transport)
        self.server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: gone. What was under way for this client ends."""
        if self._answer is not None:
            self._answer.cancel()
        if self._counted:
            self.server.model.running -= 1
        self._forget_adapter()
        self.server.connections.discard(self)
        self.server.gone()

    def pause_writing(self) -> None:
        """asyncio: the client reads too slowly."""
        self.paused = True

    def resume_writing(self) -> None:
        """asyncio: the client has caught up."""
        self.paused = False
        if isinstance(self._answer, Stream):
            self._answer.resume()

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.write(_error(400, "malformed request", "BadRequestError"))
            self.transport.close()

    def on_url(self, url: bytes) -> None:
        """httptools: the target, perhaps in several parts."""
        self._path += url.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """httptools: a part of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """httptools: a whole request is here. Answers go out in the order of the requests."""
        method = self._parser.get_method().decode()
        path, _, query = self._path.partition("?")
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._path = ""
        self._body = []
        keep = self._parser.should_keep_alive()
        if self._busy:
            self._waiting.append((method, path, query, body, keep))
        else:
            self._handle(method, path, query, body, keep)

    def _handle(self, method: str, path: str, query: str, body: bytes, keep: bool) -> None:
        self._busy = True
        self._keep = keep
        hand = self.server.model.hand
        if hand is not None and path in fake_hand.PATHS:
            self._operate(hand, path, query, body)
            return
        shape = self.server.shapes.get(path)
        if method != "POST" or not path.startswith("/v1/"):
            self._reply(self._page(method, path))
            return
        self._counted = True
        self.server.model.running += 1
        if hand is not None and hand.holds:  # not counted: what asks a sleeping engine sees nothing running
            self._counted = False
            self.server.model.running -= 1
            hand.held.append(lambda: self._answer_later(shape, path, body))
        else:
            self._answer_now(shape, path, body)

    def _answer_later(self, shape: Shape | None, path: str, body: bytes) -> None:
        if not self.transport.is_closing():
            self._answer_now(shape, path, body)

    def _answer_now(self, shape: Shape | None, path: str, body: bytes) -> None:
        if shape is not None:
            self._generate(shape, body)
        else:
            self._other(path, body)

    def _operate(self, hand: fake_hand.Hand, path: str, query: str, body: bytes) -> None:
        try:
            said = hand.answer(path, query, body)
        except fake_hand.Refused as e:
            self._reply(_error(e.status, str(e), "InternalServerError"))
            if e.dies:
                self.server.loop.call_later(0.05, crash)
            return
        self._reply(_plain(200, said.encode() if isinstance(said, str) else _encode(said)))

    def _forget_adapter(self) -> None:
        if self._under:
            self.server.model.answering.remove(self._under)
            self._under = ""

    def finish(self, finish: str, tokens: int) -> None:
        """The answer is out: take the next request of this connection."""
        model = self.server.model
        self._forget_adapter()
        if self._counted:
            model.running -= 1
        self._counted = self._busy = False
        self._answer = None
        if finish:
            model.ended(finish, tokens)
        if model.is_deaf():
            self.server.close()
        if not self._keep or self.server.stopping:
            self.transport.close()
        elif self._waiting:
            self._handle(*self._waiting.popleft())

    def close_if_idle(self) -> None:
        """The server stops."""
        if not self._busy:
            self.transport.close()

    def _reply(self, answer: bytes, finish: str = "", tokens: int = 0) -> None:
        self.transport.write(answer)
        self.finish(finish, tokens)

    def _later(self, seconds: float, answer: bytes, finish: str, tokens: int, dies: bool) -> None:
        def due() -> None:
            if dies:
                crash()
            self._reply(answer, finish, tokens)

        if seconds > 0:
            self._answer = self.server.loop.call_later(seconds, due)
        else:
            due()

    def _generate(self, shape: Shape, body: bytes) -> None:
        model = self.server.model
        settings = model.settings
        try:
            ask = self.server.decode(body)
        except msgspec.DecodeError as e:
            self._reply(_error(400, str(e), "BadRequestError"))
            return
        adapters = model.hand.adapters if model.hand is not None else {}
        if settings.model and ask.model and ask.model not in model.names and ask.model not in adapters:
            self._reply(_error(404, f"The model `{ask.model}` does not exist.", "NotFoundError"))
            return
        limit = ask.max_tokens or ask.max_completion_tokens or ask.max_output_tokens or settings.tokens
        plan = model.plan(min(limit, settings.tokens), ask.texts)
        if model.hangs() and ask.texts == 1:
            return
        if plan is None:
            self._reply(_error(500, settings.error_says, "InternalServerError"))
            return
        if ask.logprobs and model.is_nan():
            self._reply(_error(400, "Out of range float values are not JSON compliant: nan", "BadRequestError"))
            return
        if ask.model in adapters:
            self._under = ask.model
            model.answering.append(ask.model)
        number = b"%08d" % model.asked
        if ask.stream and (settings.first_token_s or settings.token_s or plan.crash):
            stream = Stream(self, self._id(shape, number), ask, plan, shape)
            self._answer = stream
            stream.start()
            return
        answer = self._answer_to(shape, ask, plan).replace(_NUMBER, number)
        seconds = settings.first_token_s + settings.token_s * max(0, len(plan.tokens) - 1)
        self._later(seconds, answer, plan.finish, len(plan.tokens), plan.crash)

    def _id(self, shape: Shape, number: bytes) -> str:
        return f"{shape.prefix}{self.server.model.settings.version}-{number.decode()}"

    def _answer_to(self, shape: Shape, ask: Ask, plan: Plan) -> bytes:
        """A whole answer, its number left open. Sound ones are kept, so that encoding them is not what is measured."""
        model = self.server.model
        said = 0.0 if model.hand is None else model.logprob(ask.model)
        key = (
            *(shape.prefix, ask.stream, bool(ask.logprobs), bool(ask.stream_options), len(plan.tokens), ask.texts),
            *(model.settings.version, ask.model if said else "", said),
        )
        long = model.hand is not None and len(bytes(ask.prompt)) >= fake_hand.BLOCK_BYTES
        sound = model.is_sound(plan) and not long
        answer = self.server.answers.get(key) if sound else None
        if answer is None:
            id = self._id(shape, _NUMBER)
            if ask.stream:
                answer = Stream(self, id, ask, plan, shape).whole()
            elif plan.broken:
                answer = _error(500, DEAD, "InternalServerError")
            else:
                answer = _plain(200, shape.whole(id, ask, plan))
            if sound and not ask.stream_options:
                self.server.answers[key] = answer
        return answer

    def _other(self, path: str, body: bytes) -> None:
        """Endpoints that answer without generating tokens one by one."""
        model = self.server.model
        if path not in ("/v1/embeddings", "/v1/audio/transcriptions", "/v1/audio/speech"):
            self._reply(_error(404, "Not Found", "NotFoundError"))
            return
        plan = model.plan(model.settings.tokens)
        if model.hangs():
            return
        if plan is None:
            answer = _error(500, model.settings.error_says, "InternalServerError")
        elif path == "/v1/embeddings":
            answer = _plain(200, self._embedding())
        elif path == "/v1/audio/transcriptions":
            text = "".join(plan.tokens)
            answer = _plain(200, _encode({"text": text, "bytes": len(body)}))
        else:
            answer = _plain(200, _wav(model.settings.version), b"audio/wav")
        self._later(model.settings.first_token_s, answer, "stop", 0, plan is not None and plan.crash)

    def _embedding(self) -> bytes:
        """A vector that tells versions apart."""
        model = self.server.model
        draw = Draw(int.from_bytes(model.settings.version.encode()[:8], "big"))
        vector = [0.0] * 8 if model.settings.empty else [round(draw() * 2 - 1, 6) for _ in range(8)]
        return _encode(
            {
                "object": "list",
                "model": model.name,
                "system_fingerprint": model.settings.version,
                "data": [{"object": "embedding", "index": 0, "embedding": vector}],
                "usage": {"prompt_tokens": 8, "total_tokens": 8},
            }
        )

    def _page(self, method: str, path: str) -> bytes:
        model = self.server.model
        if path in _DEV_PATHS:  # a gateway must never let a client come this far
            return _plain(200, b'{"fake":"an engine path was reached"}')
        if path in self.server.shapes:
            return _error(405, "Method Not Allowed", "BadRequestError")
        if method not in ("GET", "HEAD"):
            return _error(404, "Not Found", "NotFoundError")
        match path:
            case "/health" | "/ping":
                return _plain(200, b"")
            case "/v1/models":
                head = {"object": "model", "created": model.created, "owned_by": "fake"}
                adapters = model.hand.adapters if model.hand is not None else {}
                models = [{"id": name, **head} for name in (*model.names, *adapters)]
                return _plain(200, _encode({"object": "list", "data": models}))
            case "/metrics":
                return _plain(200, model.metrics(), b"text/plain; version=0.0.4; charset=utf-8")
            case "/version":
                return _plain(200, _encode({"version": model.settings.version}))
            case _:
                return _error(404, "Not Found", "NotFoundError")


def _wav(version: str) -> bytes:
    """A quarter of a second of 8-bit mono sound at 8 kHz, with the version in its last bytes."""
    data = b"\x80" * 2000 + version.encode()
    head = b"RIFF" + (36 + len(data)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    body = (1).to_bytes(2, "little") * 2 + (8000).to_bytes(4, "little") * 2 + (1).to_bytes(2, "little")
    return head + body + (8).to_bytes(2, "little") + b"data" + len(data).to_bytes(4, "little") + data


def say(line: str) -> None:
    """One log line, seen at once by whoever reads the log."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def crash() -> None:
    """Die as an engine does: a cause, a line that hides it, no goodbye."""
    say("ERROR [fake] EngineCore failed: CUDA error: an illegal memory access was encountered")
    say("RuntimeError: Engine core died. See root cause above.")
    os._exit(1)


def listener(settings: Settings) -> socket.socket:
    """The bound socket, not listening yet: like vLLM, the address exists before the model is loaded."""
    if settings.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(settings.socket)
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((settings.host, settings.port))
    sock.setblocking(False)
    return sock


async def serve(settings: Settings) -> None:
    """Load, serve, and on SIGTERM or SIGINT finish what is under way."""
    loop = asyncio.get_running_loop()
    sock = listener(settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    say(f"INFO [fake] Starting to load model {settings.model} {settings.version}")
    if settings.hang_at_load:
        await stop.wait()
        return
    await asyncio.sleep(settings.load_s)
    if settings.crash_at_load:
        say("ERROR [fake] safetensors: Error while deserializing header: incomplete metadata, file not fully covered")
        say("RuntimeError: Engine core initialization failed. See root cause above.")
        raise SystemExit(1)
    say(f"INFO [fake] Loading weights took {settings.load_s} seconds")
    server = Server(Model(settings, int(SystemClock().now().timestamp())), loop)
    make: Any = lambda: Http(server)  # noqa: E731
    if settings.socket:
        server.listening = await loop.create_unix_server(make, sock=sock, backlog=2048)
    else:
        server.listening = await loop.create_server(make, sock=sock, backlog=2048)
    say(f"INFO [fake] Application startup complete on {sock.getsockname()}")
    await stop.wait()
    empty = asyncio.Event()
    server.emptied = empty.set
    server.stop()
    await empty.wait()


def parse(argv: list[str] | None = None) -> Settings:
    """Read the flags; a wrong one ends the process with a usage message (exit code 2)."""
    p = argparse.ArgumentParser("turnout-fake-engine", description=__doc__, allow_abbrev=False)
    where = p.add_argument_group("where")
    where.add_argument("--socket", default="", help="path of the Unix socket")
    where.add_argument("--host", default="127.0.0.1")
    where.add_argument("--port", type=int, default=0, help="TCP port, where no socket is given")
    what = p.add_argument_group("what it says")
    what.add_argument("--model", default="", help="served name; other names answer 404")
    what.add_argument("--version", default="v1", help="every answer names it, and has it as system_fingerprint")
    what.add_argument("--tokens", type=int, default=16, help="most tokens of an answer")
    what.add_argument("--weights", help="what it holds; empty for none yet. Given, it can be filled, renamed and slept")
    what.add_argument("--enable-lora", action="store_true", help="takes adapters while it runs")
    when = p.add_argument_group("how long it takes")
    when.add_argument("--load-seconds", type=float, default=0.0)
    when.add_argument("--first-token-ms", type=float, default=0.0)
    when.add_argument("--token-ms", type=float, default=0.0, help="between two tokens")
    when.add_argument("--memory", type=int, default=0, help="MiB to hold")
    bad = p.add_argument_group("what goes wrong (all requests count: the first of a proof, for --deaf-after both)")
    bad.add_argument("--sound-first", type=int, default=0, help="requests that go well before the faults below begin")
    bad.add_argument("--error-rate", type=float, default=0.0, help="share of requests answered 500")
    bad.add_argument("--error-says", default=DEAD, help="message of the 500; the default says that the engine is dead")
    bad.add_argument("--stream-error-rate", type=float, default=0.0, help="share that breaks half way, status 200")
    bad.add_argument("--abort-rate", type=float, default=0.0, help="share that ends with finish_reason abort")
    bad.add_argument("--garbage", action="store_true", help="word salad without an end")
    bad.add_argument("--loop", action="store_true", help="one token over and over")
    bad.add_argument("--empty", action="store_true", help="no text at all")
    bad.add_argument("--nan", action="store_true", help="as NaN weights: empty text, or 400 where logprobs are asked")
    bad.add_argument("--crash-after", type=int, default=-1, help="answer so many requests and die in the next")
    bad.add_argument("--crash-at-load", action="store_true")
    bad.add_argument("--hang-after", type=int, default=-1, help="answer so many requests, then none; /health stays 200")
    bad.add_argument("--deaf-after", type=int, default=-1, help="answer so many requests, then take no connection")
    bad.add_argument("--hang-at-load", action="store_true", help="never get ready")
    when.add_argument("--enable-sleep-mode", action="store_true", help="it may be put to sleep; the worker asks")
    bad.add_argument("--wake-fails", action="store_true", help="put to sleep, it never comes back (500)")
    bad.add_argument("--keeps-prefixes", action="store_true", help="a pause does not empty the cache of prefixes")
    bad.add_argument("--seed", type=int, default=0, help="the same seed fails the same requests")
    a = p.parse_args(argv)
    return Settings(
        socket=a.socket,
        host=a.host,
        port=a.port,
        model=a.model,
        version=a.version,
        load_s=a.load_seconds,
        first_token_s=a.first_token_ms / 1000,
        token_s=a.token_ms / 1000,
        tokens=a.tokens,
        error_rate=a.error_rate,
        stream_error_rate=a.stream_error_rate,
        abort_rate=a.abort_rate,
        garbage=a.garbage,
        loop=a.loop,
        empty=a.empty,
        nan=a.nan,
        sound_first=a.sound_first,
        crash_after=a.crash_after,
        crash_at_load=a.crash_at_load,
        hang_after=a.hang_after,
        deaf_after=a.deaf_after,
        error_says=a.error_says,
        hang_at_load=a.hang_at_load,
        memory_mb=a.memory,
        seed=a.seed,
        weights=a.weights,
        adapters=a.enable_lora,
        wake_fails=a.wake_fails,
        keeps_prefixes=a.keeps_prefixes,
    )


def main(argv: list[str] | None = None) -> None:
    """Run until SIGTERM."""
    uvloop.run(serve(parse(argv)))


if __name__ == "__main__":
    main()
