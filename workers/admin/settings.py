"""AdminSettings: what an operator decides for the management API. Values only; workers/settings.py reads them."""

from __future__ import annotations

import math
import stat
from pathlib import Path

import msgspec

#: Shorter tokens can be guessed.
TOKEN_LENGTH_MIN = 16
#: Name of the file with a token that `turnout up` makes in its folder.
TOKEN_FILE = "admin.token"  # noqa: S105  a file's name, no password


class TokenUnusable(Exception):
    """There is no token, or none that may be used; the message says what to do."""


class AdminSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The management API's process.

    Attributes:
        enabled: whether ``turnout up`` starts it.
        host: address to listen on.
        port: 0 takes a free one.
        reuse_port: another process holds the port for this one (``turnout up`` does).
        token: what every request must carry as its bearer token; empty reads ``token_file``.
        token_file: a file that holds the token and that nobody else may read.
        max_body_bytes: larger bodies are refused (413).
        request_s: how long a request may take to arrive, and its answer to be made.
        max_connections: more are refused (503).
    """

    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = 8401
    reuse_port: bool = False
    token: str = ""
    token_file: str = ""
    max_body_bytes: int = 1024 * 1024
    request_s: float = 30.0
    max_connections: int = 256

    def problems(self) -> tuple[str, ...]:
        """What can't be meant, one sentence each, naming the field. Never says the token."""
        found = [
            f"{field} is {value}: give a number above 0"
            for field in ("max_body_bytes", "request_s", "max_connections")
            if not (math.isfinite(value := getattr(self, field)) and value > 0)
        ]
        if not 0 <= self.port <= 65535:
            found.append(f"port is {self.port}: give 0 to 65535")
        if self.token and (problem := _token_problem(self.token)):
            found.append(f"token {problem}")
        return tuple(found)

    def read_token(self) -> str:
        """The token.

        Raises:
            TokenUnusable: none is named, its file can't be read or may be read by others, or it is too short.
        """
        if self.token:
            return self.token
        if not self.token_file:
            raise TokenUnusable(
                "the management API has no token, and nothing is served without one; give one with "
                f"TURNOUT_ADMIN_TOKEN, [admin] token or token_file (turnout up makes one: .turnout/{TOKEN_FILE})"
            )
        file = Path(self.token_file)
        try:
            mode = file.stat().st_mode
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise TokenUnusable(f"the token file {file} can't be read: {e}; make one: turnout up") from e
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise TokenUnusable(f"others may read the token file {file}; close it: chmod 600 {file}")
        if problem := _token_problem(token):
            raise TokenUnusable(f"the token in {file} {problem}; make one: openssl rand -hex 32 > {file}")
        return token


def _token_problem(token: str) -> str:
    if len(token) < TOKEN_LENGTH_MIN:
        return f"has {len(token)} characters: give {TOKEN_LENGTH_MIN} or more"
    if not token.isascii() or not token.isprintable() or " " in token:
        return "has characters that no header can carry: give letters, digits and -._~+/="
    return ""
