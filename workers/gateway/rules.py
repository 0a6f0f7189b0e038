"""What rules may ask of a request, read from its head and body. Only for models that have rules.

Reading never fails: what a body does not say, or says in a shape that nobody knows, counts as not said. Texts are
measured, not built. Knows no rule and no route.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turnout.core.rules import MODALITIES, Facts
from turnout.workers.gateway.request import VALUE_MOST, is_form

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turnout.core.rules import Rules

_NUMBER_MOST = 2**53
_TOKEN_BYTES = 4

_ABSENT = msgspec.Raw(b"")


class _Body(msgspec.Struct, gc=False):
    messages: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT
    prompt: msgspec.Raw = _ABSENT
    system: msgspec.Raw = _ABSENT
    instructions: msgspec.Raw = _ABSENT
    tools: msgspec.Raw = _ABSENT
    functions: msgspec.Raw = _ABSENT
    stream: msgspec.Raw = _ABSENT
    max_completion_tokens: msgspec.Raw = _ABSENT
    max_tokens: msgspec.Raw = _ABSENT
    max_output_tokens: msgspec.Raw = _ABSENT
    user: msgspec.Raw = _ABSENT
    safety_identifier: msgspec.Raw = _ABSENT
    metadata: msgspec.Raw = _ABSENT


class _Message(msgspec.Struct, gc=False):
    content: msgspec.Raw = _ABSENT


class _Part(msgspec.Struct, gc=False):
    type: msgspec.Raw = _ABSENT
    text: msgspec.Raw = _ABSENT


_body = msgspec.json.Decoder(_Body).decode
_messages = msgspec.json.Decoder(list[_Message]).decode
_parts = msgspec.json.Decoder(list[_Part]).decode
_texts = msgspec.json.Decoder(list[msgspec.Raw]).decode
_text = msgspec.json.Decoder(str).decode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

# Names of content parts in the chat, responses and messages APIs. Others are told by the word that is in them.
_MODALITY = {
    b'"text"': "text",
    b'"input_text"': "text",
    b'"output_text"': "text",
    b'"image_url"': "image",
    b'"input_image"': "image",
    b'"image"': "image",
    b'"input_audio"': "audio",
    b'"audio_url"': "audio",
    b'"video_url"': "video",
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
        said = _body(body)
    except _ERRORS:
        return Facts(where, headers=headers)
    prompt = _Prompt()
    prompt.add(bytes(said.messages or said.input or said.prompt))
    prompt.add_content(bytes(said.system or said.instructions))
    return Facts(
        where,
        prompt.modality,
        prompt.bytes // _TOKEN_BYTES,
        prompt.messages,
        _filled(bytes(said.tools)) or _filled(bytes(said.functions)),
        bytes(said.stream) == b"true",
        _number(bytes(said.max_completion_tokens or said.max_tokens or said.max_output_tokens)),
        _value(bytes(said.user)) or _value(bytes(said.safety_identifier)),
        headers,
        _metadata(rules, bytes(said.metadata)) if rules.metadata else {},
    )


class _Prompt:
    """What the parts of a prompt add up to. ``bytes``: of text."""

    __slots__ = ("_found", "bytes", "messages")

    def __init__(self) -> None:
        self.bytes = self.messages = 0
        self._found: set[str] = set()

    @property
    def modality(self) -> list[str]:
        """What was found, in the order of ``MODALITIES``."""
        return [one for one in MODALITIES if one in self._found]

    def add(self, raw: bytes) -> None:
        """Messages, a text, texts or token ids."""
        first = raw[1:64].lstrip()[:1] if raw[:1] == b"[" else b""
        if first == b"{":
            try:
                messages = _messages(raw)
            except _ERRORS:
                return
            self.messages = len(messages)
            for message in messages:
                self.add_content(bytes(message.content))
        elif first == b'"':
            try:
                texts = _texts(raw)
            except _ERRORS:
                return
            for text in texts:
                self._add_text(bytes(text))
        elif first == b"[" or first.isdigit():
            self._found.add("text")
            self.bytes += _TOKEN_BYTES * (raw.count(b",") + 1)
        else:
            self._add_text(raw)

    def add_content(self, raw: bytes) -> None:
        """One message's: a text, or parts."""
        if raw[:1] != b"[":
            self._add_text(raw)
            return
        try:
            parts = _parts(raw)
        except _ERRORS:
            return
        for part in parts:
            kind = bytes(part.type)
            modality = _MODALITY.get(kind) or next((one for one in MODALITIES if one.encode() in kind), "")
            if modality:
                self._found.add(modality)
            if part.text:
                self._add_text(bytes(part.text))

    def _add_text(self, raw: bytes) -> None:
        if raw[:1] == b'"' and len(raw) > 2:
            self._found.add("text")
            # Other escapes are one byte too much each, which an estimate may have.
            self.bytes += len(_value(raw, len(raw)).encode()) if b"\\u" in raw else len(raw) - 2


def _of_form(path: str) -> list[str]:
    """Files are not looked at: what a form brings along follows from where it goes."""
    return ["audio"] if "/audio/" in path else ["text", "image"] if "/images/" in path else []


def _filled(raw: bytes) -> bool:
    return raw != b"null" and bool(raw.strip(b"[] \r\n\t"))


def _number(raw: bytes) -> int:
    return min(int(raw), _NUMBER_MOST) if raw[:20].isdigit() and len(raw) <= 20 else 0


def _value(raw: bytes, most: int = VALUE_MOST) -> str:
    """A text, or what else stands there as JSON; empty for nothing."""
    if raw == b"null":
        return ""
    if raw[:1] == b'"':
        try:
            return _text(raw)[:most]
        except _ERRORS:  # half of a surrogate pair
            raw = raw[1:-1]
    return raw[:most].decode("utf-8", "replace")


def _metadata(rules: Rules, raw: bytes) -> dict[str, str]:
    try:
        members = _members(raw)
    except _ERRORS:
        return {}
    return {name: _value(bytes(members[name])) for name in rules.metadata if name in members}
