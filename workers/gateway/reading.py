"""What an answer says once its last byte is there: did it end well, is it empty, does it loop, how many tokens has it.

Works on the bytes as they passed, chunk sizes and head included; nothing is parsed on the way. Pure.
"""

from __future__ import annotations

import re
from collections import deque

import msgspec

#: What is kept of an answer to be looked at: the end of a stream, and a whole answer that is not longer.
STREAM_KEPT_BYTES = 16 * 1024
WHOLE_MOST_BYTES = 64 * 1024
#: How an answer ended stands in so many bytes at its end.
END_BYTES = 4096
#: Words at the end of an answer that are searched for repeats, and the least that say anything.
LOOK_WORDS = 256
_WORDS_LEAST = 12
_TEXT_BYTES = 4096

_ERROR_EVENT = re.compile(rb'(?:^|\n)(?:event: ?(?:error|response\.failed)|data: ?\{"error")')
_ABORTED = re.compile(rb'"finish_reason": ?"abort"')
_LENGTH = re.compile(rb'"(?:finish_reason|stop_reason|reason)": ?"(?:length|max_tokens|max_output_tokens)"')
_STOPPED = re.compile(rb'"(?:finish_reason|stop_reason|status)": ?"(?:stop|end_turn|completed)"')
_CALLS = re.compile(rb'"tool_calls": ?\[\s*\{|"function_call": ?\{|"type": ?"(?:function_call|tool_use)"')
_USED = re.compile(rb'"(?:completion_tokens|output_tokens)": ?([1-9][0-9]*)')
_BLANK = re.compile(rb"(?:\s|\\[nrtf])*")
# The streams that end with `data: [DONE]`; other APIs of the engine end theirs with an event of their own.
_SAY_DONE = frozenset((b"/v1/chat/completions", b"/v1/completions"))

_CHAT = (b"content", b"reasoning_content", b"reasoning")
#: The fields that hold the text of an answer, by path: of whole answers and of streams.
_TEXTS = {
    b"/v1/chat/completions": (_CHAT, _CHAT),
    b"/v1/completions": ((b"text",), (b"text",)),
    b"/v1/responses": ((b"text",), (b"delta",)),  # the stream says all of it again at its end, as text
    b"/v1/messages": ((b"text", b"thinking"), (b"text", b"thinking")),
}


class Seen(msgspec.Struct, frozen=True, gc=False):
    """What an answer with status 200 shows. ``tokens``: of output, 0 where they can't be told."""

    outcome: str = "ok"
    signs: tuple[str, ...] = ()
    tokens: int = 0


def stream_outcome(path: bytes, end: bytes) -> str:
    """How a stream ended: its status was 200 long ago. ``end``: its last reads."""
    # A plain search first: it costs a tenth of a regular expression, and mostly there is nothing to be found.
    if (b"error" in end or b".failed" in end) and _ERROR_EVENT.search(end) is not None:
        return "error_event"
    if b'"abort"' in end and _ABORTED.search(end) is not None:
        return "aborted"
    if path in _SAY_DONE and b"[DONE]" not in end:
        return "cut"
    return "ok"


def whole_outcome(raw: bytes) -> str:
    """How an answer that is no stream ended; ``raw``: it, or its end."""
    return "aborted" if b'"abort"' in raw and _ABORTED.search(raw) is not None else "ok"


def readable(path: bytes) -> bool:
    """Whether it is known where the answers of a path have their text."""
    return path in _TEXTS


class Reading:
    """An answer on its way past: how many events it has, and its last bytes.

    Attributes:
        kept: its last reads; of an answer that is no stream all of them, where it is not too long.
        events: of a stream.
        stream: it is one.
    """

    __slots__ = ("_most", "_size", "_whole", "events", "kept", "stream")

    def __init__(self, stream: bool) -> None:
        self.stream = stream
        self._most = STREAM_KEPT_BYTES if stream else WHOLE_MOST_BYTES
        self._size = 0
        self._whole = True
        self.events = 0
        self.kept: deque[bytes] = deque()

    def add(self, data: bytes) -> None:
        """Bytes as they came."""
        self.events += data.count(b"data:")
        self.kept.append(data)
        self._size += len(data)
        if self._size > self._most:
            self._let_go()

    def _let_go(self) -> None:
        """Keep the newest reads, and of a very large one its end."""
        kept, self._whole = self.kept, False
        while len(kept) > 1 and self._size - len(kept[0]) >= self._most:
            self._size -= len(kept.popleft())
        if len(kept) == 1:
            kept[0] = kept[0][-self._most :]
            self._size = len(kept[0])

    def seen(self, path: bytes) -> Seen:
        """Look at an answer that has come to its end."""
        raw = b"".join(self.kept)
        end = raw[-END_BYTES:]
        outcome = stream_outcome(path, end) if self.stream else whole_outcome(end)
        fields = _TEXTS.get(path)
        if outcome != "ok" or fields is None or not (self.stream or self._whole):
            return Seen(outcome)
        said = _texts(raw, fields[self.stream])
        signs: tuple[str, ...] = ()
        if (b'"length"' in end or b'"max_' in end) and _LENGTH.search(end) is not None:
            signs = ("length",)
        elif self._whole and _BLANK.fullmatch(said) and _STOPPED.search(end) and not _CALLS.search(raw):
            signs = ("empty",)
        if repeats(said):
            signs += ("repetition",)
        used: list[bytes] = _USED.findall(end) if b"_tokens" in end else []
        return Seen("ok", signs, int(used[-1]) if used else self.events)


def _texts(raw: bytes, fields: tuple[bytes, ...]) -> bytes:
    """The JSON strings in some fields, one after the other, their escapes as they are."""
    parts: list[bytes] = []
    for gap in (b"", b" "):  # an engine leaves a blank behind every colon or behind none
        for field in fields:
            for part in raw.split(b'"%b":%b"' % (field, gap))[1:]:
                end = part.find(b'"')
                while end > 0 and part[end - 1] == 0x5C:  # an escaped quote
                    end = part.find(b'"', end + 1)
                parts.append(part[:end])
        if parts:
            break
    return b"".join(parts)


def repeats(text: bytes) -> bool:
    """Whether half of the 4-grams at the end of a text are repeats.

    Of words, as an engine's own tokens are not known here; of single characters where the text has no blanks.
    """
    end = text[-_TEXT_BYTES:].replace(b"\\n", b" ")
    words: list[bytes] | list[str] = end.split()[-LOOK_WORDS:]
    if len(words) < _WORDS_LEAST:
        words = list(end.decode("utf-8", "replace"))[-LOOK_WORDS:]
        if len(words) < _WORDS_LEAST:
            return False
    if 2 * (len(set(words)) - 3) > len(words):  # too many different ones, cheaper to see than the 4-grams
        return False
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 2 * len(set(grams)) <= len(grams)
