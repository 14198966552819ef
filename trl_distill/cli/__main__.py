"""The console command: `trl-distill COMMAND ...`, or `python -m trl_distill.cli COMMAND ...` for launchers.

Each command is a module of this folder with `run(arguments)`, imported when it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import sys

from .._version import __version__
from .arguments import prepare_environment


COMMANDS = {
    "train": "distil a teacher into a student on the student's own completions, with or without rewards",
    "check": "compare student, teacher, data and settings before a run; trains nothing",
    "generate": "let teachers complete prompts; verify, filter and save a dataset",
    "evaluate": "how good saved models are: accuracy, KL to the teacher, length, diversity",
    "report": "an HTML page that shows completions token by token, by their KL to the teacher",
    "plot": "curves of one or several runs as a picture",
    "sweep": "the runs of a sweep's YAML, one after another, with a table and a picture",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: trl-distill COMMAND ...",
            "",
            *lines,
            "",
            "`trl-distill COMMAND --help` shows its arguments and a first example; `--version` the version.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """
    Run a command.

    Args:
        arguments (`list[str]`, *optional*): the command and its own arguments; those of the process unless given.

    Returns:
        `int`: the status to exit with.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"trl-distill {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1)
        meant = f" Did you mean `{close[0]}`?" if close else ""
        print(f"trl-distill: there is no command {name!r}.{meant}\n\n{usage()}", file=sys.stderr)
        return 2
    prepare_environment(name)
    return importlib.import_module(f"trl_distill.cli.{name}").run(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
