"""``policy set``, ``show``, ``remove``: named ways to switch a model. Also how a command's own parameters are read."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.text import Text

from turnout.core import policy as policies
from turnout.core.decider import Rejected
from turnout.workers.answers import CommandRejected
from turnout.workers.cli.terminal import DONE, Terminal, common
from turnout.workers.cli.words import toml
from turnout.workers.client import ModelSwitcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turnout.workers.client import Client


class TableFile(click.ParamType[dict[str, Any]]):
    """A TOML or JSON file with one table."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The table."""
        if isinstance(value, dict):
            return cast("dict[str, Any]", value)
        path = Path(value)
        if path.suffix not in (".toml", ".json"):
            self.fail(f"{value}: the name must end with .toml or .json", param, ctx)
        try:
            text = path.read_text(encoding="utf-8")
            table: object = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except (OSError, UnicodeDecodeError) as e:
            self.fail(f"{value} can't be read: {e.strerror if isinstance(e, OSError) else e}", param, ctx)
        except ValueError as e:  # both decoders'
            self.fail(f"{value} is no {path.suffix[1:].upper()}: {e}", param, ctx)
        if not isinstance(table, dict):
            self.fail(f"{value} holds no table", param, ctx)
        return cast("dict[str, Any]", table)


class Setting(click.ParamType[dict[str, Any]]):
    """``KEY=VALUE`` with a TOML value; a plain word needs no quotes, a dot leads into a table."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The table with this one key."""
        if isinstance(value, dict):
            return cast("dict[str, Any]", value)
        key, equals, text = str(value).partition("=")
        if not equals or not key.strip():
            self.fail(f"{value!r}: write KEY=VALUE, e.g. stepDeadline=30m or steps='[{{setWeight = 5}}]'", param, ctx)
        try:
            return tomllib.loads(f"{key} = {text}")
        except tomllib.TOMLDecodeError as e:
            if text[:1] in ("[", "{", '"', "'"):
                self.fail(f"{text} is no TOML value: {e}", param, ctx)
        try:
            return tomllib.loads(f"{key} = {json.dumps(text)}")
        except tomllib.TOMLDecodeError as e:
            self.fail(f"{key!r} is no key: {e}", param, ctx)


def joined(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All tables in one; where two name the same key the later one wins, and tables within them are joined."""
    made: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            inner = made.get(key)
            if isinstance(inner, dict) and isinstance(value, dict):
                made[key] = joined((cast("dict[str, Any]", inner), cast("dict[str, Any]", value)))
            else:
                made[key] = value
    return made


def parsed(raw: dict[str, Any]) -> policies.Policy:
    """A policy that this command brings along.

    Raises:
        CommandRejected: it can't be meant.
    """
    policy = policies.parse(raw)
    if isinstance(policy, tuple):
        raise CommandRejected(
            Rejected("policy_invalid", "; ".join(policy), "correct the named fields; docs/strategies.md has all words")
        )
    return policy


@click.group()
def policy() -> None:
    """Name ways to switch a model: strategy and parameters, for turnout switch --policy NAME."""


@policy.command("set")
@click.argument("model")
@click.argument("name")
@click.argument("file", type=TableFile())
@common
def set_policy(io: Terminal, model: str, name: str, file: dict[str, Any]) -> None:
    """Set policy NAME of MODEL from FILE (.toml or .json). Running switches keep what they began with.

    \b
    strategy = "canary"
    steps = [{setWeight = 5}, {analysis = {}}, {setWeight = 50}, {pause = {duration = "10m"}}]
    bake = "30m"
    """  # noqa: D301  click reads the backspace

    async def work(client: Client) -> int:
        parsed(file)  # here, too: JSON has no word for what TOML calls nan and inf
        new = await ModelSwitcher(client).set_policy(model, name, file)
        if io.json:
            io.emit({"status": "accepted", "model": model, "name": name, "new": new, "policy": file})
            return DONE
        io.say(f"set policy {name} of {model}" if new else f"policy {name} of {model} is set like this already")
        io.next(f"turnout switch {model} VERSION --policy {name} --dry-run")
        return DONE

    io.run(work)


@policy.command("show")
@click.argument("model")
@click.argument("name", required=False, default="")
@common
def show_policy(io: Terminal, model: str, name: str) -> None:
    """Show the policies of MODEL, or the one of this NAME, and what they do."""

    async def work(client: Client) -> int:
        known = await ModelSwitcher(client).get_policies(model)
        if name and name not in known:
            raise CommandRejected(
                Rejected(
                    "policy_unknown",
                    f"{model} has no policy {name!r} (set: {', '.join(sorted(known)) or 'none'})",
                    f"set it first: turnout policy set {model} {name} FILE",
                )
            )
        shown = {name: known[name]} if name else dict(sorted(known.items()))
        if io.json:
            io.emit({"model": model, "policies": shown})
            return DONE
        if not shown:
            io.say(f"{model} has no policies")
            io.next(f"turnout policy set {model} NAME FILE")
        for number, (one, raw) in enumerate(shown.items()):
            if number:
                io.say("")
            io.say(one, "bold")
            for line in toml(raw).splitlines():
                io.say(f"  {line}")
            for line in _plan(raw):
                io.say(Text(f"  # {line}", "dim"))
        return DONE

    io.run(work)


@policy.command("remove")
@click.argument("model")
@click.argument("name")
@common
def remove_policy(io: Terminal, model: str, name: str) -> None:
    """Take policy NAME of MODEL away. Running switches keep what they began with."""

    async def work(client: Client) -> int:
        gone = await ModelSwitcher(client).remove_policy(model, name)
        if io.json:
            io.emit({"status": "accepted", "model": model, "name": name, "new": gone})
        else:
            io.say(f"removed policy {name} of {model}" if gone else f"{model} has no policy {name!r}: nothing to do")
        return DONE

    io.run(work)


def _plan(raw: dict[str, Any]) -> tuple[str, ...]:
    """What a policy does, in words; its problems where this turnout would not take it any more."""
    policy = policies.parse(raw)
    return policy if isinstance(policy, tuple) else policies.describe(policy.strategy, policy.parameters)
