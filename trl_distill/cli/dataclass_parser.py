"""The parser of `train`, `check` and `generate`: TRL's, with suggestions, one word for one thing, and help by use."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl import TrlParser

from .arguments import CommandParser


class DataclassParser(CommandParser, TrlParser):
    """
    Arguments of dataclasses, on the command line or in the YAML file that `--config` names.

    Args:
        types (`Sequence[type]`): the dataclasses.
        command (`str`): name of the command.
        text (`str`, *optional*): what `--help` begins with.
        first (`Sequence[str]`): the arguments that `--help` shows before all others.
        renamed (`Mapping[str, str]`, *optional*): the word on the command line, by the field's name.
    """

    def __init__(
        self,
        types: Sequence[type],
        *,
        command: str,
        text: str | None,
        first: Sequence[str],
        renamed: Mapping[str, str] | None = None,
    ):
        self.first, self.renamed = first, dict(renamed or {})
        super().__init__(types, command=command, text=text)

    def add_argument(self, *names: str, **how: Any) -> argparse.Action:
        """As argparse's; a field that is called otherwise on the command line gets that word."""
        field = names[0].removeprefix("--")
        if field in self.renamed:
            new = self.renamed[field]
            names, how = (f"--{new}", f"--{new.replace('_', '-')}"), {"dest": field, "metavar": new.upper(), **how}
        return super().add_argument(*names, **how)

    def option_names(self) -> list[str]:
        """With `--config`, which TRL takes out of the words before they are parsed."""
        return ["--config", *super().option_names()]

    def parse_args_and_config(self, args: Iterable[str] | None = None, *rest: Any, **how: Any) -> tuple[Any, ...]:
        """As TRL's; what is wrong with the YAML file is said without a traceback."""
        import yaml

        words: list[str] = []
        for word in args or []:
            words += word.split("=", 1) if word.startswith("--config=") else [word]
        if "--config" not in words:
            return super().parse_args_and_config(words, *rest, **how)
        path = "".join(words[words.index("--config") + 1 :][:1])
        if not Path(path).is_file():
            self.error(f"`--config` names {path!r}, which is no file. Name a YAML file of arguments.")
        try:
            return super().parse_args_and_config(words, *rest, **how)
        except yaml.YAMLError as error:
            self.error(f"{path} is no YAML. {error}")

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """
        As TRL's, with the command line's words for fields; keys that are no arguments end with a suggestion. A single
        value of an argument that takes several is a list of one.
        """
        fields = {action.dest: action.dest for action in self._actions if action.option_strings}
        fields |= {new: field for field, new in self.renamed.items()}
        old = [key for key in config if key not in fields or key in self.renamed]
        lists = {action.dest for action in self._actions if action.nargs in ("+", "*")}
        named = {self.new_name(key) if key in old else key: value for key, value in config.items()}
        if unknown := [key for key in named if key not in fields]:
            self.unknown(unknown, " (in the YAML file)")
        given = {fields[key]: value for key, value in named.items()}
        for field in lists & given.keys():
            if not isinstance(given[field], list | dict | None):
                given[field] = [given[field]]
        return super().set_defaults_with_config(**given)

    def options(self, words: Iterable[str]) -> argparse.Namespace:
        """All arguments, checked by their names and types, without making the dataclasses, which look at devices."""
        types, self.dataclass_types = self.dataclass_types, []
        try:
            (found,) = self.parse_args_and_config(words)
        finally:
            self.dataclass_types = types
        return found

    def format_help(self) -> str:
        """The example, the arguments that are used most, then all others."""
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage("%(prog)s [--config FILE.yaml] [--ARGUMENT VALUE ...]", [], [])
        formatter.add_text(self.description)
        by_name = {action.dest: action for action in reversed(self._actions)}
        first = [by_name[name] for name in self.first]
        for title, actions in (
            ("most used", first),
            ("all others", [action for action in self._actions if action not in first]),
        ):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()
