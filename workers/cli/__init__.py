"""The command line: thin over commands and views. A command is imported when it is called, so that it starts fast."""

from __future__ import annotations

import importlib

import click

#: Sections of the help, and in each: command → its module here and one line of help.
_SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Start": {
        "up": ("processes", "Run everything on this machine, with its own NATS server."),
        "demo": ("demo", "Watch a switch and an undo under load."),
        "doctor": ("doctor", "Say what this machine has and what is missing."),
    },
    "Models": {
        "register": ("models", "Add a version of a model."),
        "deregister": ("models", "Take a version away that nothing uses."),
        "models": ("models", "List the models and what they serve."),
        "versions": ("versions", "List the versions of a model."),
        "compare": ("versions", "Set two versions of a model side by side."),
        "get": ("get", "Show one model: versions, instances, gateways, the running switch."),
        "stop": ("stop", "Stop one instance; --force: whatever runs on it."),
        "ps": ("ondemand", "List what is loaded, and until when."),
        "on-demand": ("ondemand", "Load a model only while somebody uses it."),
        "health": ("health", "Show how the versions of a model do."),
        "policy": ("policies", "Name ways to switch a model."),
        "rules": ("rules", "Choose a version by what a request is."),
    },
    "Switches": {
        "switch": ("switches", "Send a model's traffic to a version."),
        "status": ("switches", "Show how far a switch is, or how it ended."),
        "promote": ("switches", "Let a running switch past its step."),
        "pause": ("switches", "Let a running switch stand still."),
        "resume": ("switches", "Let a paused switch go on."),
        "abort": ("switches", "End a running switch; what has moved goes back."),
        "retry": ("switches", "Try the version of an ended switch again."),
        "undo": ("switches", "Go back to the last known good version, at once."),
    },
    "Cache": {
        "cache": ("cache", "Show what is loaded where, and what would make room next."),
        "workers": ("cache", "List the workers: devices, memory, places."),
        "preload": ("cache", "Load a version ahead, once there is room."),
        "pin": ("cache", "Keep a version's instances whatever the cache says."),
        "unpin": ("cache", "Let the cache decide about a version again."),
        "evict": ("cache", "Stop a version's idle instances now."),
        "replicas": ("cache", "Set how many instances a version has while it serves."),
        "place": ("cache", "Say where a version would be loaded, or why not."),
    },
    "Audit": {
        "alerts": ("alerts", "List what needs a person, or say that you have seen it."),
        "report": ("report", "Tell everything about one switch, also as a page with plots."),
        "log": ("audit", "Tell what happened, in plain sentences."),
        "verify": ("audit", "Check the log's chain, and the views against the log."),
    },
    "Processes": {
        "controller": ("processes", "Run a controller: decides commands, runs the switches."),
        "worker": ("processes", "Run a worker: owns this host's devices, runs engines."),
        "gateway": ("processes", "Run a gateway: takes the OpenAI clients' requests."),
        "admin": ("processes", "Run the management API: HTTP for programs, with a token."),
        "completion": ("completion", "Print the completion script of a shell."),
    },
}
_COMMANDS = {name: where for section in _SECTIONS.values() for name, where in section.items()}


class _Lazy(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, help = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{module}"), cmd_name.replace("-", "_"))
        command.short_help = help
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, _COMMANDS))
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), help) for name, (_, help) in commands.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """An unknown command names the nearest one."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            import difflib  # needed on this path only

            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            ctx.fail(f"there is no command {args[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from turnout.events.version import VERSION

        click.echo(f"turnout {VERSION}")
        ctx.exit()


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Say the version.")
def cli() -> None:
    """Switch the model behind a served name while requests are running.

    Exit codes: 0 done, 1 rejected or failed, 2 wrong usage; with --wait also 3 rolled back or aborted, 4 held,
    5 still running when the time was up. Every command takes --json.
    """


def main() -> None:
    """The ``turnout`` command."""
    cli(prog_name="turnout")
