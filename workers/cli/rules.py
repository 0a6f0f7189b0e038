"""``rules set``, ``show``, ``test``: choose a version, or another model, by what a request is."""

from __future__ import annotations

import difflib
from typing import IO, TYPE_CHECKING, Any, cast

import click
import msgspec
from rich.text import Text

from turnout.core import rules as core
from turnout.core.decider import Accepted, Rejected
from turnout.core.model import SetRules
from turnout.events.route import Rule
from turnout.projections.routing import RouteView
from turnout.workers.answers import CommandRejected
from turnout.workers.cli.policies import TableFile
from turnout.workers.cli.terminal import DONE, Terminal, common, rows, table
from turnout.workers.cli.words import toml
from turnout.workers.ruling import Ruling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turnout.workers.client import Client

_OUTCOMES = {
    "decides": ("decides", "green"),
    "passes": ("does not apply", "dim"),
    "outside": ("outside of its percent", "dim"),
    "not_ready": ("not ready", "yellow"),
    "failed": ("fails", "bold red"),
    "not_asked": ("not asked", "dim"),
}


class Header(click.ParamType[tuple[str, str]]):
    """``NAME=VALUE`` → lower-case name and value."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """The header."""
        if isinstance(value, tuple):
            return cast("tuple[str, str]", value)
        name, equals, text = str(value).partition("=")
        if not equals or not name.strip():
            self.fail(f"{value!r}: write NAME=VALUE, e.g. x-team=beta", param, ctx)
        return name.strip().lower(), text.strip()


def parsed(raw: dict[str, Any]) -> tuple[Rule, ...]:
    """The rules of a file.

    Raises:
        CommandRejected: they can't be meant; the reason names each rule and field.
    """
    problems: list[str] = []
    listed: object = raw.get("rules")
    if not isinstance(listed, list):
        problems.append("the file has no list of rules: write [[rules]] before each")
        listed = []
    problems += (f"{name!r} is no list that belongs here: only rules" for name in raw if name != "rules")
    made: list[Rule] = []
    for number, one in enumerate(cast("list[object]", listed)):
        if unknown := _unknown(one):
            problems += (f"rules[{number}].{problem}" for problem in unknown)
            continue
        try:
            made.append(msgspec.convert(one, Rule))
        except msgspec.ValidationError as e:
            problems.append(f"rules[{number}]: {e}")
    problems += core.problems(made)
    if problems:
        raise CommandRejected(
            Rejected("rules_invalid", "; ".join(problems), "correct them; docs/rules.md has every name and field")
        )
    return tuple(made)


def _unknown(one: object) -> list[str]:
    """Fields of a rule that there aren't, each with the nearest that there is."""
    fields = Rule.__struct_fields__
    said: list[str] = []
    for name in cast("dict[str, object]", one) if isinstance(one, dict) else ():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            said.append(f"{name} is unknown: " + (f"did you mean {near[0]}?" if near else f"use {', '.join(fields)}"))
    return said


@click.group()
def rules() -> None:
    """Choose a version, or another model, by what a request is: modality, length, tools, headers, user."""


@rules.command("set")
@click.argument("model")
@click.argument("file", type=TableFile())
@common
def set_rules(io: Terminal, model: str, file: dict[str, Any]) -> None:
    """Set the rules of MODEL, all of them, from FILE (.toml or .json). The first that applies decides.

    \b
    [[rules]]
    name = "pictures"
    when = "'image' in modality"
    model = "chat-vision"

    \b
    [[rules]]
    name = "short-first"
    when = "tokens < 500 && !tools"
    candidate = true
    """  # noqa: D301  click reads the backspace
    made = _or_exit(io, file)

    async def work(client: Client) -> int:
        answer = await client.send("model.rules", SetRules(model, made))
        new = isinstance(answer, Accepted) and bool(answer.events)
        if io.json:
            io.emit({"status": "accepted", "model": model, "new": new, "rules": made})
            return DONE
        what = f"{len(made)} rule{'s' if len(made) != 1 else ''}" if made else "no rules"
        io.say(f"{model} has {what} from now on" if new else f"{model} has these rules already")
        if made:
            io.next(f"turnout rules test {model} --request FILE")
        return DONE

    io.run(work)


@rules.command("show")
@click.argument("model")
@common
def show_rules(io: Terminal, model: str) -> None:
    """Show the rules of MODEL, as `turnout rules set` takes them."""

    async def work(client: Client) -> int:
        known = (await client.model(model)).rules
        if io.json:
            io.emit({"model": model, "rules": known})
            return DONE
        if not known:
            io.say(f"{model} has no rules: its split decides")
            io.next(f"turnout rules set {model} FILE")
        for number, rule in enumerate(known):
            if number:
                io.say("")
            io.say("[[rules]]", "bold")
            for line in toml(_fields(rule)).splitlines():
                io.say(line)
        return DONE

    io.run(work)


@rules.command("test")
@click.argument("model")
@click.option("--request", "request", type=click.File("rb"), required=True, help="Its JSON body; - reads stdin.")
@click.option("--header", "headers", type=Header(), multiple=True, help="A header of it, e.g. x-team=beta.")
@click.option("--path", default="/v1/chat/completions", show_default=True, help="Where it is sent to.")
@click.option("--rules", "file", type=TableFile(), default=None, help="Ask these instead of those that are set.")
@common
def test_rules(
    io: Terminal,
    model: str,
    request: IO[bytes],
    headers: tuple[tuple[str, str], ...],
    path: str,
    file: dict[str, Any] | None,
) -> None:
    """Say which rule of MODEL decides about a request, and why. Nothing is sent.

    \b
    turnout rules test chat --request body.json --header x-team=beta
    turnout rules test chat --request body.json --rules new.toml     # before they are set
    """  # noqa: D301  click reads the backspace
    body = _body(request, model)
    if file is not None:
        made = _or_exit(io, file)
        _tell(io, Ruling(model, made, path, dict(headers), body, {}))
        return

    async def work(client: Client) -> int:
        known = (await client.model(model)).rules
        found = await client.views("route.*")
        routes = {key: view for key, view in found.items() if isinstance(view, RouteView)}
        _tell(io, Ruling(model, known, path, dict(headers), body, routes))
        return DONE

    io.run(work)


def _tell(io: Terminal, test: Ruling) -> None:
    if io.json:
        io.emit(
            {
                "rule": test.decided.name if test.decided is not None else None,
                "goes_to": test.goes,
                "rules": test.told,
                "facts": msgspec.structs.asdict(test.facts),
            }
        )
        return
    by = f"rule {test.decided.name!r} decides" if test.decided is not None else "no rule applies"
    io.say(Text.assemble((by, "bold"), f": it goes to {test.goes}"))
    if test.told:
        io.say("")
        lines: Sequence[Sequence[str | Text]] = [
            (told.rule, Text(*_OUTCOMES[told.outcome]), told.reason) for told in test.told
        ]
        io.show(rows(table("RULE", "", "WHY"), lines))


def _or_exit(io: Terminal, file: dict[str, Any]) -> tuple[Rule, ...]:
    """The rules of a file, or why there are none, and the end of the process."""
    try:
        return parsed(file)
    except CommandRejected as e:
        io.refused(e.answer)
        raise SystemExit(1) from None


def _body(request: IO[bytes], model: str) -> bytes:
    """A request's body with the model in it."""
    try:
        members = msgspec.json.decode(request.read(), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise click.BadParameter(f"is no JSON object: {e}", param_hint="--request") from e
    return msgspec.json.encode({**members, "model": model})


def _fields(rule: Rule) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(rule)
    return made
