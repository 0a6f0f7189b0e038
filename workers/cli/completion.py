"""``completion``: the script that makes a shell complete turnout's commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from turnout.workers.cli.terminal import Terminal, common


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@common
def completion(io: Terminal, shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash:  eval "$(turnout completion bash)"                     in ~/.bashrc
    zsh:   eval "$(turnout completion zsh)"                      in ~/.zshrc
    fish:  turnout completion fish > ~/.config/fish/completions/turnout.fish
    """  # noqa: D301  click reads the backspace
    made = get_completion_class(shell)
    if made is None:
        raise click.BadParameter(f"{shell} is not known")
    script = made(click.get_current_context().find_root().command, {}, "turnout", "_TURNOUT_COMPLETE").source()
    if io.json:
        io.emit({"shell": shell, "script": script})
    else:
        click.echo(script)
