"""What rules may ask of a request, read from its head and body. Only for models that have rules.

Reading never fails: what a body does not say, or says in a shape that nobody knows, counts as not said. Chats of the
usual shape are read by a typed decoder, everything else by a slower one that takes any JSON; both find the same. Knows
no rule and no route.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import msgspec

from turnout.core.rules import MODALITIES, Facts
from turnout.workers.gateway.request import VALUE_MOST, is_form

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turnout.core.rules import Rules

_NUMBER_MOST = 2**53
_TOKEN_BYTES = 4
_ABSENT = msgspec.Raw(b"")


class _Part(msgspec.Struct, gc=False):
    type: str = ""
    text: str = ""


class _Message(msgspec.Struct, gc=False):
    content: str | list[_Part] | None = None


class _Chat(msgspec.Struct, gc=False):
    messages: list[_Message]
    tools: msgspec.Raw = _ABSENT
    functions: msgspec.Raw = _ABSENT
    system: str | list[_Part] | None = None
    stream: bool | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    max_output_tokens: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: msgspec.Raw = _ABSENT


_chat = msgspec.json.Decoder(_Chat).decode
_any = msgspec.json.Decoder().decode
_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

# The names of content parts in the chat, responses and messages APIs; others are told by the word that is in them.
_MODALITY = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio",
    "video_url": "video",
}


def facts_of(rules: Rules, path: bytes, headers: Mapping[str, str], content_type: bytes, body: bytes) -> Facts:
    """What the rules may ask of a request.

    Args:
        rules: decide what is read.
        path: of the URL.
        headers: lower-case name → value; no more than the rules ask for.
        content_type: of the body.
        body: JSON or a form.
    """
    where = path.decode("latin-1")
    if not rules.reads_body:
        return Facts(where, headers=headers)
    if is_form(content_type):
        return Facts(where, _of_form(where), headers=headers)
    try:
        return _of_chat(rules, where, headers, _chat(body))
    except _ERRORS:
        pass
    try:
        return _of_any(rules, where, headers, _any(body))
    except _ERRORS:
        return Facts(where, headers=headers)


class _Prompt:
    """What the parts of a prompt add up to. ``bytes``: of text."""

    __slots__ = ("_found", "bytes")

    def __init__(self) -> None:
        self.bytes = 0
        self._found: set[str] = set()

    @property
    def modality(self) -> list[str]:
        """What was found, in the order of ``MODALITIES``."""
        return [one for one in MODALITIES if one in self._found]

    @property
    def tokens(self) -> int:
        """An estimate."""
        return self.bytes // _TOKEN_BYTES

    def add_content(self, content: str | Sequence[_Part] | None) -> None:
        """One message's."""
        if isinstance(content, str):
            self.add_text(content)
        elif content is not None:
            for part in content:
                self.add_kind(part.type)
                self.add_text(part.text)

    def add_text(self, text: str) -> None:
        """A text."""
        if text:
            self._found.add("text")
            self.bytes += len(text) if text.isascii() else len(text.encode())

    def add_kind(self, kind: str) -> None:
        """The ``type`` of a content part."""
        modality = _MODALITY.get(kind) or next((one for one in MODALITIES if one in kind), "")
        if modality:
            self._found.add(modality)

    def add(self, value: object) -> None:
        """Whatever a prompt may be: text, token ids, parts, messages, and lists of them."""
        match value:
            case str():
                self.add_text(value)
            case list():
                parts = cast("list[object]", value)
                if parts and isinstance(parts[0], int):
                    self._found.add("text")
                    self.bytes += _TOKEN_BYTES * len(parts)
                    return
                for part in parts:
                    self.add(part)
            case dict():
                said = cast("dict[str, object]", value)
                if isinstance(kind := said.get("type"), str):
                    self.add_kind(kind)
                self.add(said.get("content"))
                self.add(said.get("text"))
            case _:
                pass


def _of_chat(rules: Rules, path: str, headers: Mapping[str, str], chat: _Chat) -> Facts:
    prompt = _Prompt()
    for message in chat.messages:
        prompt.add_content(message.content)
    prompt.add_content(chat.system)
    most = chat.max_completion_tokens or chat.max_tokens or chat.max_output_tokens or 0
    return Facts(
        path,
        prompt.modality,
        prompt.tokens,
        len(chat.messages),
        _filled(chat.tools) or _filled(chat.functions),
        chat.stream is True,
        min(max(most, 0), _NUMBER_MOST),
        (chat.user or chat.safety_identifier or "")[:VALUE_MOST],
        headers,
        _metadata(rules, _any(chat.metadata)) if rules.metadata and chat.metadata else {},
    )


def _of_any(rules: Rules, path: str, headers: Mapping[str, str], body: object) -> Facts:
    if not isinstance(body, dict):
        return Facts(path, headers=headers)
    said = cast("dict[str, object]", body)
    asked: object = said.get("messages") or said.get("input") or said.get("prompt")
    prompt = _Prompt()
    prompt.add(asked)
    prompt.add(said.get("system"))
    prompt.add(said.get("instructions"))
    messages = cast("list[object]", asked) if isinstance(asked, list) else []
    longest = (said.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"))
    users = (said.get(name) for name in ("user", "safety_identifier"))
    return Facts(
        path,
        prompt.modality,
        prompt.tokens,
        sum(isinstance(one, dict) for one in messages),
        any(isinstance(said.get(name), list) and bool(said[name]) for name in ("tools", "functions")),
        said.get("stream") is True,
        min(next((n for n in longest if type(n) is int and n > 0), 0), _NUMBER_MOST),
        next((user for user in users if isinstance(user, str) and user), "")[:VALUE_MOST],
        headers,
        _metadata(rules, said.get("metadata")),
    )


def _of_form(path: str) -> list[str]:
    """Files are not looked at: what a form brings along follows from where it goes."""
    return ["audio"] if "/audio/" in path else ["text", "image"] if "/images/" in path else []


def _filled(raw: msgspec.Raw) -> bool:
    """Whether it is a list with something in it."""
    said = bytes(raw)
    return said[:1] == b"[" and said[1:64].lstrip()[:1] != b"]"


def _metadata(rules: Rules, said: object) -> dict[str, str]:
    """The entries that the rules ask for, as text."""
    if not isinstance(said, dict):
        return {}
    fields = cast("dict[str, object]", said)
    return {name: _text(fields[name])[:VALUE_MOST] for name in rules.metadata if name in fields}


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else msgspec.json.encode(value).decode()
