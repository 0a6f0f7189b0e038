"""What a gateway must know of a request to route it: is the path served, which model, which sticky key.

Pure functions over bytes. The body is looked at and not changed, as engines are started with the served name. Only
where a rule sends a request to another model does its ``model`` field get that model's name.

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

#: A rule sees so many characters of a header, a user or a metadata value.
VALUE_MOST = 512

NO_MODEL = Refusal(
    400, "model_missing", 'the request names no model: add "model": "NAME" (see GET /v1/models)', param="model"
)


#: So much of a prompt decides where prompts that begin alike go.
PREFIX_BYTES = 1024
_PROMPT = re.compile(rb'"(?:messages|prompt|input)"[ \t\r\n]*:[ \t\r\n]*')

_ABSENT = msgspec.Raw(b"")


class _Fields(msgspec.Struct, gc=False):
    """The routing fields of a JSON body; everything else is skipped without being built."""

    model: str | None = None
    user: msgspec.Raw = _ABSENT
    prompt_cache_key: msgspec.Raw = _ABSENT
    safety_identifier: msgspec.Raw = _ABSENT


_decode = msgspec.json.Decoder(_Fields).decode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

_NO_KEY = (b"", b"null", b'""')


class Routing(msgspec.Struct, frozen=True, gc=False):
    """The model that a request names, and what its body says of the user (empty where it says nothing)."""

    model: str
    key: bytes = b""


def served(path: bytes) -> bool:
    """Whether the path may reach an engine. Takes the path as it came: nothing is decoded, so nothing hides in it."""
    return _PATHS.fullmatch(path) is not None


def is_form(content_type: bytes) -> bool:
    """Whether the body is multipart/form-data; everything else is read as JSON."""
    return content_type[:20].lower().startswith(b"multipart/form-data")


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
    if fields.user is _ABSENT and fields.prompt_cache_key is _ABSENT and fields.safety_identifier is _ABSENT:
        return Routing(fields.model)
    for raw in (fields.user, fields.prompt_cache_key, fields.safety_identifier):
        if raw is not _ABSENT and (key := bytes(raw)) not in _NO_KEY:
            return Routing(fields.model, key)
    return Routing(fields.model)


def from_form(content_type: bytes, body: bytes) -> Routing | Refusal:
    """The ``model`` field of a multipart/form-data body."""
    found = _form_fields(content_type, body)
    if isinstance(found, Refusal):
        return found
    models, users = found[b"model"], found[b"user"]
    if len(models) > 1:
        return Refusal(400, "model_invalid", "the form names more than one model", param="model")
    if not models or not body[models[0]]:
        return NO_MODEL
    try:
        return Routing(body[models[0]].decode(), body[users[0]] if users else b"")
    except UnicodeDecodeError:
        return Refusal(400, "model_invalid", '"model" must be UTF-8', param="model")


def with_model(content_type: bytes, body: bytes, model: str) -> bytes:
    """The body with another model in its ``model`` field, for an engine that knows only that one.

    ``body``: one that ``from_json`` or ``from_form`` has found a model in. Every other value stays as it came.
    """
    if is_form(content_type):
        fields = _form_fields(content_type, body)
        if isinstance(fields, Refusal):
            return body
        place = fields[b"model"][0]
        return body[: place.start] + model.encode() + body[place.stop :]
    members = _members(body)
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(members)


def prompt_start(body: bytes) -> bytes:
    """How the prompt of a JSON body begins: the same for prompts that an engine may answer from one prefix cache."""
    found = _PROMPT.search(body)
    return b"" if found is None else body[found.end() : found.end() + PREFIX_BYTES]


def _form_fields(content_type: bytes, body: bytes) -> dict[bytes, list[slice]] | Refusal:
    """Where the values of the fields that matter stand in a multipart/form-data body."""
    header = Message()
    header["content-type"] = content_type.decode("latin-1")
    boundary = header.get_boundary()
    if not boundary:
        return Refusal(400, "form_invalid", "multipart/form-data needs a boundary in its content-type")
    found: dict[bytes, list[slice]] = {b"model": [], b"user": []}
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
            found[name[1] or name[2]].append(slice(value_at, end))
        start = end
    return found


_NAME = re.compile(
    rb'^content-disposition:[ \t]*form-data;(?:.*?;)??[ \t]*name=(?:"([^"\r\n]*)"|([^";\s]+))', re.I | re.M
)


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
    """The bytes are no request that can be answered otherwise; the connection must be closed."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(status, code, message)


class Head:
    """The head of a request. Shared by all requests of a connection that have the same one; never changed once read.

    Attributes:
        method: ``GET``, ``POST`` …
        target: path and query as they came, in origin form.
        path: the path alone.
        length: bytes of the body by Content-Length; -1 where it comes in chunks.
        expects: the client waits for 100 Continue.
        id: the client's ``x-request-id``, empty where there is none.
        pin: the version that ``x-turnout-version`` names.
        sticky: value of the configured sticky header.
        keep_alive: the client lets the connection stand after the answer.
        plain: nothing about it is special: a data path, posted JSON, no pin.
    """

    __slots__ = (
        "_asked",
        "_for",
        "_lines",
        "_problem",
        "authorization",
        "connection",
        "content_encoding",
        "content_type",
        "expects",
        "hosts",
        "http10",
        "id",
        "keep_alive",
        "length",
        "method",
        "path",
        "pin",
        "plain",
        "sticky",
        "target",
    )

    def __init__(self) -> None:
        self.method = self.target = self.path = b""
        self.length = 0
        self.hosts = 0
        self.expects = self.http10 = self.plain = False
        self.keep_alive = True
        self.id = self.pin = self.sticky = b""
        self.authorization = self.content_type = self.content_encoding = self.connection = b""
        self._lines: list[bytes] = []
        self._problem: BadRequest | None = None
        self._for: tuple[Target | None, bytes, bytes] = (None, b"", b"")
        self._asked: tuple[frozenset[str], dict[str, str]] = (frozenset(), {})

    def values(self, names: frozenset[str]) -> dict[str, str]:
        """The headers of these names (in lower case) that are there; a name that stands twice has both values."""
        known, found = self._asked
        if known is not names:
            found = {}
            for n in range(0, len(self._lines), 4):
                name = self._lines[n].decode("latin-1").lower()
                if name in names:
                    value = self._lines[n + 2].decode("latin-1")
                    found[name] = (f"{found[name]}, {value}" if name in found else value)[:VALUE_MOST]
            self._asked = (names, found)
        return found

    @property
    def query(self) -> bytes:
        """What stands behind the question mark."""
        return self.target.partition(b"?")[2]

    def for_engine(self, target: Target, id: bytes, body: bytes, alone: bool = False) -> bytes:
        """The request as an engine gets it, or its head ``alone``; the body is whole by now however it came."""
        known, start, lines = self._for
        if known is not target:
            start = b"%b %b%b%bx-request-id: " % (self.method, target.base, self.target, target.host_line)
            lines = b"".join((b"\r\n", *self._lines))
            self._for = (target, start, lines)
        length = b"content-length: %d\r\n\r\n" % len(body) if body or self.method == b"POST" else b"\r\n"
        return b"".join((start, id, lines, length, b"" if alone else body))

    def check(self, parser: httptools.HttpRequestParser, head: bytes, sticky_header: bytes) -> None:
        """Finish a head that the parser has accepted.

        Raises:
            BadRequest: it can't be passed on.
        """
        if self._problem is not None:
            raise self._problem
        version = parser.get_http_version()
        if version == "1.0":
            self.http10, self.keep_alive = True, False
            if self.length < 0:
                raise BadRequest(400, "request_invalid", "HTTP/1.0 has no chunked bodies")
        elif version != "1.1":
            raise BadRequest(505, "http_version_unsupported", f"HTTP/{version} is not spoken here: use HTTP/1.1")
        elif self.hosts != 1:
            raise BadRequest(400, "request_invalid", "there must be exactly one Host header")
        self.method = parser.get_method()
        target = self.target
        if not target.startswith(b"/"):
            target = self.target = _origin_form(target)
        self.path = target.partition(b"?")[0]
        connection = self.connection
        if connection and connection != b"keep-alive":
            self.keep_alive = self.keep_alive and b"close" not in connection
        if connection not in _PLAIN_CONNECTION or sticky_header or b"\r\nx-turnout-" in head.lower():
            self._sort_lines(sticky_header)
        self.plain = (
            self.method == b"POST"
            and served(self.path)
            and not self.pin
            and not self.content_encoding
            and not is_form(self.content_type)
        )

    def _sort_lines(self, sticky_header: bytes) -> None:
        """Take out what must not be passed on, and read what only some requests have."""
        hops = {token.strip() for token in self.connection.split(b",")}
        lines, self._lines = self._lines, []
        for n in range(0, len(lines), 4):
            name = lines[n].lower()
            if name == sticky_header:
                self.sticky = lines[n + 2]
            if name == b"x-turnout-version":
                self.pin = lines[n + 2]
            if name not in hops and not name.startswith(b"x-turnout-"):
                self._lines += lines[n : n + 4]

    # httptools; an exception in here would come out wrapped, so a problem is noted and raised by check()

    def on_url(self, url: bytes) -> None:
        """The request line's target."""
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        known = _KNOWN.get(name.lower())
        if known is None:
            self._lines += (name, b": ", value, b"\r\n")
        elif known == _HOST:
            self.hosts += 1
        elif known == _LENGTH:
            self.length = int(value)
        elif known == _TYPE:
            self.content_type = value
            self._lines += (name, b": ", value, b"\r\n")
        elif known == _CONNECTION:
            self.connection = self.connection + b"," + value.lower() if self.connection else value.lower()
        elif known == _AUTHORIZATION:
            self.authorization = value
            self._lines += (name, b": ", value, b"\r\n")
        elif known == _ID:
            if _REQUEST_ID.fullmatch(value):
                self.id = value
        elif known == _CODING:
            if value.lower() != b"chunked":
                self._problem = BadRequest(400, "request_invalid", "the only transfer coding taken is chunked")
            self.length = -1
        elif known == _EXPECT:
            if value.lower() != b"100-continue":
                self._problem = BadRequest(417, "expectation_unknown", "only Expect: 100-continue is understood")
            self.expects = True
        elif known == _ENCODING:
            self.content_encoding = value.lower()
            self._lines += (name, b": ", value, b"\r\n")


_PLAIN_CONNECTION = frozenset((b"", b"keep-alive", b"close"))


def read_head(head: bytes, sticky_header: bytes = b"") -> Head:
    """Read a request's head, up to and with its empty line. ``sticky_header``: lower-case name, or empty.

    Raises:
        BadRequest: the bytes are no request, or an ambiguous one.
    """
    if head[:1] in b"\r\n":
        raise BadRequest(400, "request_invalid", "a request begins with its method")
    made = Head()
    parser = httptools.HttpRequestParser(made)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        # What the client would like to speak instead is not spoken here; a server may go on in HTTP/1.1 (RFC 9110,
        # 7.8). Only CONNECT can't be answered like that.
        if parser.get_method() == b"CONNECT":
            raise BadRequest(405, "method_not_allowed", "CONNECT is not served") from None
    except httptools.HttpParserError as e:
        raise BadRequest(400, "request_invalid", f"this is not a valid HTTP request: {e}") from e
    made.check(parser, head, sticky_header)
    return made


class Request:
    """One request of a client, read whole.

    ``keep_alive``: the connection may stand after the answer. ``key``: its sticky key, empty where it has none.
    ``apart``: the split did not choose its version, a pin or a rule did; so its fate is compared with nothing.
    """

    __slots__ = ("apart", "body", "head", "id", "keep_alive", "key", "pin")

    def __init__(self, head: Head, id: bytes, body: bytes) -> None:
        self.head = head
        self.id = id
        self.body = body
        self.keep_alive = head.keep_alive
        self.key = b""
        self.apart = False
        #: The version that a tester asks for, where that is allowed.
        self.pin = ""


class Repeat:
    """A head that was read and accepted, to know it again: clients send the same one but for the body's length.

    It compares all bytes, so what it knows again was checked. Made for one connection: nobody else's key is kept.
    """

    __slots__ = ("_after", "_after_bytes", "_before", "_most_bytes", "_start", "head")

    def __init__(self, before: bytes, after: bytes, head: Head, most_bytes: int) -> None:
        self._before = before
        self._start = len(before)
        self._after = after
        self._after_bytes = len(after)
        self._most_bytes = most_bytes
        self.head = head

    @staticmethod
    def of(raw: bytes, head: Head, most_bytes: int) -> Repeat | None:
        """What to know again; None where the head has no length to differ in, or says something of this time only.

        Args:
            raw: the head's bytes.
            head: what was read of them.
            most_bytes: of a body; a larger one is for the longer way to refuse.
        """
        if head.id or head.expects or head.http10 or head.length < 0:
            return None
        found = _LENGTH_LINE.search(raw)
        return None if found is None else Repeat(raw[: found.start(1)], raw[found.end(1) :], head, most_bytes)

    def body(self, data: bytes) -> bytes | None:
        """The body, where the bytes are this head again, one whole body and nothing else."""
        start = self._start
        end = data.find(b"\r", start, start + 12)
        at = end + self._after_bytes
        if data[:start] == self._before and data[end:at] == self._after:  # slices cost less than startswith()
            digits = data[start:end]
            if digits.isdigit() and len(data) - at == int(digits) <= self._most_bytes:
                return data[at:]
        return None


_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ ]*([0-9]+)\r\n", re.IGNORECASE)


def _origin_form(target: bytes) -> bytes:
    """``http://host/path?query`` → ``/path?query``: what a proxy's client sends (RFC 9112, 3.2.2)."""
    try:
        url = urlsplit(target)
    except ValueError:
        return target
    if url.scheme not in (b"http", b"https") or not url.netloc:
        return target
    return (url.path or b"/") + (b"?" + url.query if url.query else b"")


class ChunkedBody:
    """A request body that comes in chunks. ``complete`` when its end was seen, ``extra`` when more came behind it."""

    __slots__ = ("_parser", "_parts", "complete", "extra", "raw_bytes", "size")

    def __init__(self) -> None:
        self.complete = self.extra = False
        self.size = self.raw_bytes = 0
        self._parts: list[bytes] = []
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")

    def feed(self, data: bytes) -> None:
        """Take raw bytes.

        Raises:
            BadRequest: the chunks are malformed.
        """
        self.raw_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            if not self.complete:
                raise BadRequest(400, "request_invalid", f"the chunked body is malformed: {e}") from e
            self.extra = True

    def body(self) -> bytes:
        """What the chunks held."""
        return b"".join(self._parts)

    def on_message_begin(self) -> None:
        """A request begins: the second one is not part of this body."""
        self.extra = self.complete

    def on_body(self, body: bytes) -> None:
        """Content."""
        if not self.complete:
            self.size += len(body)
            self._parts.append(body)

    def on_message_complete(self) -> None:
        """The last chunk and its trailers are over; trailers are dropped."""
        self.complete = True


def model_in_path(path: bytes) -> str:
    """The id in ``/v1/models/ID``; ids may hold slashes, and come percent-encoded."""
    return unquote_to_bytes(path.removeprefix(b"/v1/models/")).decode("utf-8", "replace")
