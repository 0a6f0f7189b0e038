"""What all commands share: their common options, how they speak, and what their exit codes mean.

On a terminal there is colour; piped output is plain and never cut. With ``--json`` nothing but JSON is on stdout, and
rich is never imported: processes start faster.
"""

from __future__ import annotations

import asyncio
import functools
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import click
import msgspec

from turnout.core.decider import Failed, Rejected
from turnout.events.store import Damaged, LogReplaced, Unavailable
from turnout.workers.answers import CommandRejected, ControllerBug

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from turnout.workers.client import Client

DONE, FAILED, USAGE, BACK, HELD, TIMEOUT = 0, 1, 2, 3, 4, 5
_INTERRUPTED = 130

P = ParamSpec("P")

_UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|min|m|h|)")


class Duration(click.ParamType[float]):
    """``30``, ``30s``, ``500ms``, ``5m``, ``1h``, ``1h30m`` → seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        if isinstance(value, int | float):
            return float(value)
        parts = _PART.findall(value)
        whole = "".join(number + unit for number, unit in parts)
        if not parts or whole != value or (len(parts) > 1 and any(not unit for _, unit in parts)):
            self.fail(f"{value!r} is no duration: write 30, 30s, 5m, 1h or 1h30m", param, ctx)
        return sum(float(number) * _UNITS_S[unit] for number, unit in parts)


class Terminal:
    """Where a command speaks.

    Attributes:
        json: nothing but JSON on stdout.
        nats: address of NATS, empty for the default.
    """

    def __init__(self, json: bool = False, nats: str = "") -> None:
        self.json = json
        self.nats = nats

    @functools.cached_property
    def out(self) -> Console:
        """For what was asked for."""
        return _console(sys.stdout)

    @functools.cached_property
    def err(self) -> Console:
        """For what went wrong."""
        return _console(sys.stderr)

    def emit(self, value: object) -> None:
        """One JSON object on one line."""
        sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
        sys.stdout.flush()

    def say(self, text: str | Text, style: str = "") -> None:
        """A line for people; silent with ``--json``."""
        if not self.json:
            self.out.print(text, style=style or None)

    def show(self, what: RenderableType) -> None:
        """A table or tree; without blanks at the ends of its lines where it goes into a pipe."""
        if self.out.is_terminal:
            self.out.print(what)
            return
        with self.out.capture() as captured:
            self.out.print(what)
        sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def next(self, text: str) -> None:
        """What to do next."""
        self.say(f"next: {text}", "dim")

    def fail(self, code: str, reason: str, hint: str = "", status: str = "error") -> None:
        """Say what went wrong, and what to do."""
        if self.json:
            self.emit({"status": status, "code": code, "reason": reason, "hint": hint})
            return
        from rich.text import Text

        word = "rejected" if status == "rejected" else "failed"
        self.err.print(Text.assemble((f"{word}: ", "bold red"), reason))
        if hint:
            self.err.print(Text.assemble((" " * (len(word) - 3) + "try: ", "bold"), hint))

    def run(self, work: Callable[[Client], Awaitable[int]]) -> NoReturn:
        """Connect, do the work, end the process with its exit code."""
        from turnout.workers.client import connect

        async def connected() -> int:
            async with connect(self.nats) as client:
                return await work(client)

        self.run_process(connected)

    def run_process(
        self,
        work: Callable[[], Coroutine[Any, Any, int]],
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    ) -> NoReturn:
        """Do the work, end the process with its exit code. The edge where errors become words."""
        try:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                code = runner.run(work())
        except CommandRejected as e:
            self.refused(e.answer)
            code = FAILED
        except ControllerBug as e:
            self.refused(e.answer)
            code = FAILED
        except Unavailable as e:
            self.fail(e.code, *_reason_and_hint(str(e)))
            code = FAILED
        except (Damaged, LogReplaced) as e:
            self.fail("log_damaged", str(e), "check it: turnout verify")
            code = FAILED
        except BrokenPipeError:  # `turnout log | head`
            sys.stderr.close()
            code = DONE
        except KeyboardInterrupt:
            code = _INTERRUPTED
        sys.exit(code)

    def refused(self, answer: Rejected | Failed) -> None:
        """Say an answer that is a no."""
        self.fail(answer.code, answer.reason, answer.hint, "rejected" if isinstance(answer, Rejected) else "error")


def common(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--json`` and ``--nats``; the command gets a ``Terminal`` as its first argument."""

    @click.option("--json", "json_", is_flag=True, help="Print JSON and nothing else.")
    @click.option(
        "--nats", metavar="URL", default="", help="Address of NATS. Default: the `turnout up` of this folder."
    )
    @functools.wraps(command)
    def wrapped(*args: Any, json_: bool, nats: str, **kwargs: Any) -> None:
        command(Terminal(json_, nats), *args, **kwargs)

    return wrapped


def table(*columns: str) -> Table:
    """A table of plain columns."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def rows(made: Table, lines: Sequence[Sequence[str | Text]]) -> Table:
    """Fill a table; no text is read as markup."""
    from rich.text import Text

    for line in lines:
        made.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in line))
    return made


def _console(stream: Any) -> Console:
    from rich.console import Console

    terminal = stream.isatty()
    # a pipe has no width: nothing is wrapped or cut in it
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=None if terminal else 10_000)


def _reason_and_hint(text: str) -> tuple[str, str]:
    """The text of an infrastructure error: what stands after a semicolon says what to do."""
    reason, _, hint = text.partition("; ")
    return reason, hint or "see that turnout runs: turnout up, or name its NATS with --nats URL"
