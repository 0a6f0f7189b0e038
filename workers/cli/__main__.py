"""``python -m turnout.workers.cli``: the command of this very interpreter, for child processes."""

from turnout.workers.cli import main

main()
