"""What the commands share in reading their arguments: environment, old words, suggestions, help.

Imports nothing heavy: `trl-distill --help` and a mistyped command are answered at once. The parser of commands whose
arguments are dataclasses is in `dataclass_parser.py`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import shlex
import string
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn


OLD_WORDS = {  # what arguments were called, and are called now; a command takes those whose new word it has
    "completions_per_prompt": "num_generations",
    "model": "model_name_or_path",
    "models": "model_name_or_path",
    "prompts": "dataset_name",
    "split": "dataset_split",
    "teacher": "teacher_model_name_or_path",
    "verifier": "reward_funcs",
}


READERS = ("evaluate", "report", "plot")  # commands that only read what training has written


def prepare_environment(command: str) -> None:
    """
    Set what must be set before the libraries are imported.

    Training keeps transformers' warnings, which are about the run, and DeepSpeed's own choice of a device. Commands
    that only read saved models are quiet. Variables that are set already stay as they are.

    Args:
        command (`str`): one of `trl-distill`'s.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other
    if command in READERS:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if not os.path.exists("/dev/nvidiactl"):
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where installed, would look for one and warn
    if command == "generate":
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # reward functions may fork


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A page of help: the docstring as it is written, each argument by its one name, with its default if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")] or action.option_strings
        value = "" if action.nargs == 0 else self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {value}".rstrip()


class CommandParser(argparse.ArgumentParser):
    """
    The parser of one command. It takes old words and says the new ones; a mistyped argument ends with the likeliest one
    and status 2.

    Args:
        command (`str`): name of the command.
        text (`str`, *optional*): what `--help` begins with: the docstring of the command's module, with an example.
        how: further arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, *positional: Any, command: str, text: str | None, **how: Any):
        self.told: set[str] = set()
        how |= {"prog": f"trl-distill {command}", "description": text, "formatter_class": Help}
        super().__init__(*positional, **how)

    def option_names(self) -> list[str]:
        """All arguments that begin with `--`."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def new_name(self, name: str) -> str:
        """The word in use for an argument without its dashes; an old one is said to be old, once."""
        new = OLD_WORDS.get(name.replace("-", "_"))
        options = self.option_names()
        if new is None or f"--{name}" in options or f"--{new}" not in options:
            return name
        if name not in self.told and os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: `--{name}` is now called `--{new}`; the old word still works.", file=sys.stderr)
        self.told.add(name)
        return new

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but an argument that does not exist is an error, said before any that is missing."""
        words = [*(sys.argv[1:] if args is None else args)]
        end = words.index("--") if "--" in words else len(words)
        options, unknown = self.option_names(), []
        for i, word in enumerate(words[:end]):
            name, equals, value = word[2:].partition("=")
            if not word.startswith("--") or " " in name:
                continue
            name = self.new_name(name)
            words[i] = f"--{name}{equals}{value}"
            if not any(option.startswith(f"--{name}") for option in options):  # argparse takes beginnings of words
                unknown.append(name)
        if unknown:
            self.unknown(unknown)
        found, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"no argument takes {' '.join(map(repr, rest))}.")
        return found, rest

    def unknown(self, names: list[str], where: str = "") -> NoReturn:
        """End with a suggestion for each name (without its dashes)."""
        known = {name[2:]: None for name in self.option_names() if "-" not in name[2:]}
        parts = []
        for name in names:
            close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            meant = f" Did you mean `--{close[0]}`?" if close else ""
            parts.append(f"there is no argument `--{name}`{where}.{meant}")
        self.error("\n".join(parts))

    def error(self, message: str) -> NoReturn:
        """Without the usage, which for hundreds of arguments would hide the message."""
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` shows an example and all arguments.\n")


TEMPERATURE = (
    "of sampling, and of both models in the KL; with 0 the likeliest tokens are taken, and the KL is that at 1"
)


def check_sampling(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message unless how many completions are sampled, and how, can be done."""
    for name in ("num_prompts", "num_generations", "max_completion_length", "batch_size"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} is {getattr(options, name)}; it must be more than 0")
    if options.temperature < 0:
        parser.error(f"--temperature is {options.temperature:g}; it must be 0, for the likeliest tokens, or more")
    if options.temperature == 0 and options.num_generations > 1:
        parser.error(
            f"--num_generations is {options.num_generations}, but at --temperature 0 all completions of a prompt are "
            "the same: leave one of the two out"
        )


def finite(text: str) -> float:
    """The type of arguments that are numbers, without NaN and infinity."""
    found = float(text)
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def template_kwargs(text: str) -> dict[str, Any]:
    """What `--chat_template_kwargs` says."""
    try:
        found = json.loads(text, parse_constant=_refuse)  # Python's reads NaN
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; write '{{\"enable_thinking\": false}}'")
    return found


def expand_together(arguments: list[str]) -> list[str]:
    """`--together="--a 1 --b 2"` as its parts: a grid combines all with all, and not all combinations exist."""
    flag = "--together="
    words = [shlex.split(word.removeprefix(flag)) if word.startswith(flag) else [word] for word in arguments]
    return [part for parts in words for part in parts]


def with_environment(output_dir: str) -> str:
    """The folder's name with its `$NAME` replaced: nothing may be written to one that is called "$WANDB_RUN_ID"."""
    try:
        return string.Template(output_dir).substitute(os.environ)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"`--output_dir` is {output_dir!r}, but the environment does not say what to write there ({error}). Set "
            "the variable (`wandb agent` sets WANDB_RUN_ID), give another folder, or write `$$` for a dollar sign."
        ) from None


@contextmanager
def errors_without_traceback() -> Iterator[None]:
    """What is wrong with the arguments is said without a traceback, which would hide it."""
    try:
        yield
    except ValueError as error:
        sys.exit(f"{error}")
