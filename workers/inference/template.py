"""Whether a chat template can be meant: its marks and blocks, without Jinja. Finds what surely does not parse, no more.

An engine finds the rest when it renders the first chat; its worker's golden chat request shows that before traffic.
"""

from __future__ import annotations

import re

#: Jinja's blocks, and those that tokenizers add.
_BLOCKS = frozenset(
    ("for", "if", "macro", "call", "filter", "block", "raw", "with", "autoescape", "trans", "generation")
)
_INNER = {"else": ("if", "for"), "elif": ("if",), "pluralize": ("trans",)}
_OPEN = re.compile(r"\{[%{#]")
_CLOSE = {"{%": "%}", "{{": "}}", "{#": "#}"}
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_RAW_END = re.compile(r"\{%[-+]?\s*endraw\s*[-+]?%\}")
#: A ``set`` with a value is whole; one without begins a block.
_SET_VALUE = re.compile(r"set\s[^=]*=")


def problem(text: str) -> str:
    """Why the template does not parse, with its line; empty where nothing speaks against it."""
    open_: list[tuple[str, int]] = []
    at = 0
    while found := _OPEN.search(text, at):
        mark, line = found[0], text.count("\n", 0, found.start()) + 1
        end = _end(text, found.end(), _CLOSE[mark], strings=mark != "{#")
        if end < 0:
            return f"line {line}: {mark} is never closed"
        inside = text[found.end() : end].strip("-+ \t\n\r")
        at = end + 2
        if mark != "{%":
            continue
        word = re.match(r"\w*", inside)
        name = word[0] if word else ""
        if name == "raw":
            over = _RAW_END.search(text, at)
            if over is None:
                return f"line {line}: raw is never ended"
            at = over.end()
        elif name in _BLOCKS or (name == "set" and not _SET_VALUE.match(inside)):
            open_.append((name, line))
        elif name.startswith("end"):
            if not open_ or open_[-1][0] != name[3:]:
                within = f", and {open_[-1][0]} of line {open_[-1][1]} is open" if open_ else " without its beginning"
                return f"line {line}: {name}{within}"
            open_.pop()
        elif name in _INNER and (not open_ or open_[-1][0] not in _INNER[name]):
            return f"line {line}: {name} outside of {' and '.join(_INNER[name])}"
    return f"line {open_[-1][1]}: {open_[-1][0]} is never ended" if open_ else ""


def _end(text: str, at: int, close: str, *, strings: bool) -> int:
    """Where the closing mark is; a mark inside a string is none. -1 where there is none."""
    while True:
        end = text.find(close, at)
        if end < 0 or not strings:
            return end
        quoted = next((s for s in _STRING.finditer(text, at, len(text)) if s.end() > at), None)
        if quoted is None or quoted.start() > end:
            return end
        at = quoted.end()
