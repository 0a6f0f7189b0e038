"""What a gateway must know of a request to route it: is the path served, which model, which sticky key.

Pure functions over bytes. The body is looked at, never changed: engines are started with the served name.

httptools 0.9 (llhttp 9, strict) refuses bare LF, obs-fold, white space before a colon, Content-Length with
Transfer-Encoding, any second or odd Content-Length and every coding but one final ``chunked``. What it lets through is
refused here: other HTTP versions, Transfer-Encoding under HTTP/1.0, further codings, a missing or second Host, and a
line feed before the request line. tests/unit/gateway/test_request.py holds both lists.
"""

from __future__ import annotations

import re
from email.message import Message
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit

import httptools
import msgspec

from turnout.workers.gateway.errors import Refusal

if TYPE_CHECKING:
    from turnout.workers.gateway.upstream import Target

#: The data paths of OpenAI's API and vLLM's additions to it. Everything else of an engine stays out of reach: what
#: loads, sleeps, pauses or measures it, whatever a later version of it will add.
_PATHS = re.compile(
    rb"/v1/(?:"
    rb"chat/completions(?:/batch)?"
    rb"|completions|embeddings|moderations|rerank|score|pooling|classify"
    rb"|responses(?:/[A-Za-z0-9_-]+(?:/(?:cancel|input_items))?)?"
    rb"|messages(?:/count_tokens)?"
    rb"|audio/(?:speech|transcriptions|translations|voices)"
    rb"|images/(?:generations|edits|variations)"
    rb"|videos(?:/[A-Za-z0-9_-]+(?:/(?:content|remix))?)?"
    rb")"
)

METHODS = frozenset((b"GET", b"POST", b"DELETE"))

NO_MODEL = Refusal(
    400, "model_missing", 'the request names no model: add "model": "NAME" (see GET /v1/models)', param="model"
)


class _Fields(msgspec.Struct, gc=False):
    """The routing fields of a JSON body; everything else is skipped without being built."""

    model: str | None = None
    user: msgspec.Raw = msgspec.Raw(b"")
    prompt_cache_key: msgspec.Raw = msgspec.Raw(b"")
    safety_identifier: msgspec.Raw = msgspec.Raw(b"")


_decode = msgspec.json.Decoder(_Fields).decode

_NO_KEY = (b"", b"null", b'""')


class Routing(msgspec.Struct, frozen=True, gc=False):
    """The model that a request names, and what its body says of the user (empty where it says nothing)."""

    model: str
    key: bytes = b""


def served(path: bytes) -> bool:
    """Whether the path may reach an engine. Takes the path as it came: nothing is decoded, so nothing hides in it."""
    return _PATHS.fullmatch(path) is not None


def from_json(body: bytes) -> Routing | Refusal:
    """Routing fields of a JSON object. A name that stands twice counts as its last one, as engines read it."""
    try:
        fields = _decode(body)
    except msgspec.ValidationError as e:
        if "$.model" in str(e):
            return Refusal(400, "model_invalid", f'"model" must be a string: {e}', param="model")
        return Refusal(400, "json_invalid", f"the body must be a JSON object: {e}")
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        return Refusal(400, "json_invalid", f"the body is not valid JSON: {e}")
    except RecursionError:
        return Refusal(400, "json_invalid", "the body is nested too deeply")
    if not fields.model:
        return NO_MODEL
    for raw in (fields.user, fields.prompt_cache_key, fields.safety_identifier):
        key = bytes(raw)
        if key not in _NO_KEY:
            return Routing(fields.model, key)
    return Routing(fields.model)


def from_form(content_type: bytes, body: bytes) -> Routing | Refusal:
    """The ``model`` field of a multipart/form-data body."""
    header = Message()
    header["content-type"] = content_type.decode("latin-1")
    boundary = header.get_boundary()
    if not boundary:
        return Refusal(400, "form_invalid", "multipart/form-data needs a boundary in its content-type")
    found: dict[bytes, list[bytes]] = {b"model": [], b"user": []}
    # A leading CRLF makes the first delimiter look like all others (RFC 2046, 5.1.1).
    delimiter = b"\r\n--" + boundary.encode("latin-1")
    start = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    if start == -1:
        return Refusal(400, "form_invalid", "the form's boundary does not occur in its body")
    while True:
        part = start + len(delimiter)
        if body.startswith(b"--", part):
            break
        end = body.find(delimiter, part)
        if end < 0:
            return Refusal(400, "form_invalid", "the form ends before its last boundary")
        _, _, field = body[part : min(part + 2048, end)].partition(b"\r\n")
        head, blank, _ = field.partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if blank and name is not None and (name[1] or name[2]) in found:
            value_at = body.index(b"\r\n\r\n", part) + 4
            found[name[1] or name[2]].append(body[value_at:end])
        start = end
    if len(found[b"model"]) > 1:
        return Refusal(400, "model_invalid", "the form names more than one model", param="model")
    if not found[b"model"] or not found[b"model"][0]:
        return NO_MODEL
    try:
        return Routing(found[b"model"][0].decode(), b"".join(found[b"user"][:1]))
    except UnicodeDecodeError:
        return Refusal(400, "model_invalid", '"model" must be UTF-8', param="model")


_NAME = re.compile(rb'^content-disposition:[ \t]*form-data;(?:.*?;)??[ \t]*name=(?:"([^"\r\n]*)"|([^";\s]+))', re.I | re.M)


def from_query(query: bytes) -> str:
    """``model`` in a query string, for requests that have no body to name it in; empty where there is none."""
    return parse_qs(query.decode("latin-1")).get("model", [""])[-1]


_HOST, _CONNECTION, _LENGTH, _CODING, _TYPE, _ID, _EXPECT, _AUTHORIZATION, _ENCODING, _HOP = range(10)

# What the gateway reads itself or must not pass on: the rest of a head goes on as it came.
_KNOWN = {
    b"host": _HOST,
    b"connection": _CONNECTION,
    b"content-length": _LENGTH,
    b"transfer-encoding": _CODING,
    b"content-type": _TYPE,
    b"x-request-id": _ID,
    b"expect": _EXPECT,
    b"authorization": _AUTHORIZATION,
    b"content-encoding": _ENCODING,
    b"keep-alive": _HOP,
    b"proxy-connection": _HOP,
    b"proxy-authorization": _HOP,
    b"te": _HOP,
    b"trailer": _HOP,
    b"upgrade": _HOP,
    b"http2-settings": _HOP,
}

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class BadRequest(Exception):
    """The bytes are no request that can be passed on; the connection must be closed."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def bad(message: str) -> BadRequest:
    """What is wrong with the bytes."""
    return BadRequest(Refusal(400, "request_invalid", message))


class Request:
    """One request of a client.

    Attributes:
        method: ``GET``, ``POST`` …
        target: path and query as they came, in origin form.
        path: the path alone.
        length: bytes of the body by Content-Length; -1 where it comes in chunks.
        expects: the client waits for 100 Continue.
        id: the client's ``x-request-id``, or one that the gateway makes; empty until then.
        pin: the version that ``x-turnout-version`` names.
        sticky: value of the configured sticky header.
        keep_alive: the client lets the connection stand after the answer.
        body: the whole body.
    """

    __slots__ = (
        "_host",
        "_lines",
        "_own",
        "authorization",
        "body",
        "content_encoding",
        "content_type",
        "expects",
        "http10",
        "id",
        "keep_alive",
        "length",
        "method",
        "path",
        "pin",
        "sticky",
        "target",
    )

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.path = b""
        self.length = 0
        self.expects = False
        self.http10 = False
        self.keep_alive = True
        self.id = b""
        self.pin = b""
        self.sticky = b""
        self.authorization = b""
        self.content_type = b""
        self.content_encoding = b""
        self.body = b""
        self._host = 0
        self._lines: list[bytes] = []
        self._own: dict[bytes, bytes] | None = None

    @property
    def query(self) -> bytes:
        """What stands behind the question mark."""
        return self.target.partition(b"?")[2]

    def head_for(self, target: Target) -> bytes:
        """The head as an engine gets it."""
        return b"".join(
            (
                self.method,
                b" ",
                target.base,
                self.target,
                target.host_line,
                *self._lines,
                b"x-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (self.id, len(self.body))
                if self.body or self.method == b"POST"
                else b"x-request-id: %b\r\n\r\n" % self.id,
            )
        )

    # httptools

    def on_url(self, url: bytes) -> None:
        """The request line's target."""
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        known = _KNOWN.get(name.lower())
        if known is None:
            if self._own is not None and self._take_own(name.lower(), value):
                return
            self._lines += (name, b": ", value, b"\r\n")
        elif known == _LENGTH:
            self.length = int(value)
        elif known == _TYPE:
            self.content_type += value
            self._lines += (name, b": ", value, b"\r\n")
        elif known == _AUTHORIZATION:
            self.authorization += value
            self._lines += (name, b": ", value, b"\r\n")
        elif known == _HOST:
            self._host += 1
        elif known == _CODING:
            if value.lower() != b"chunked":
                raise bad("the only transfer coding that is understood is chunked")
            self.length = -1
        elif known == _ID:
            if _REQUEST_ID.fullmatch(value):
                self.id = value
        elif known == _EXPECT:
            if value.lower() != b"100-continue":
                raise BadRequest(Refusal(417, "expectation_unknown", "only Expect: 100-continue is understood"))
            self.expects = True
        elif known == _ENCODING:
            self.content_encoding = value.lower()
            self._lines += (name, b": ", value, b"\r\n")
        elif known == _CONNECTION and value.lower() not in (b"keep-alive", b"close"):
            self._note_hop(value)

    def _take_own(self, name: bytes, value: bytes) -> bool:
        """Headers that only some requests have: true where this one must not be passed on."""
        own = self._own
        if own is None:
            return False
        if name.startswith(b"x-turnout-"):
            own[name] = value
            return True
        return False

    def _note_hop(self, value: bytes) -> None:
        """Connection names further headers that are meant for this connection only."""
        if self._own is None:
            self._own = {}
        self._own[b"connection"] = self._own.get(b"connection", b"") + b"," + value.lower()
