"""Reads the benchmarks that rows must not overlap with. How texts are compared is in `contamination.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.json_rows import SUFFIXES, InputRow
from ...server_urls import without_login
from ..text import flat
from ..work_folder import digest, file_digest
from .contamination import Benchmarks
from .ingest import prompt_and_columns, read_rows


if TYPE_CHECKING:
    from ..config import GenerateConfig


COLUMNS = ("question", "problem", "query", "input", "text")  # where benchmarks without `prompt` have their question


def load_benchmarks(config: GenerateConfig) -> Benchmarks | None:
    """
    The benchmarks that the settings name, or `None`.

    Raises:
        ValueError: there is no such file or dataset, or it holds no text that can be compared.
    """
    if not config.benchmarks:
        return None
    found = Benchmarks(config.benchmark_ngram, _texts(config.benchmarks))
    missing = [name for name in config.benchmarks if name not in found.names]
    if missing:
        raise ValueError(
            f"The benchmark {without_login(missing[0])!r} has no text of {found.short} words or more, so nothing can "
            f"be compared with it. Rows need a column `prompt`, `messages` or one of {', '.join(COLUMNS)}."
        )
    return found


def benchmarks_digest(config: GenerateConfig) -> str | None:
    """Of the benchmarks' local files and the length of n-grams: prompts depend on them. `None` without benchmarks."""
    if not config.benchmarks:
        return None
    files = [file_digest(Path(name)) for name in config.benchmarks if Path(name).is_file()]
    return digest(config.benchmark_ngram, config.benchmarks, files).hex()


def _texts(benchmarks: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """The questions of all benchmarks; empty for rows without one."""
    for name in dict.fromkeys(benchmarks):
        for number, found in enumerate(_read(name), start=1):
            yield name, number, _question(found) or ""


def _read(name: str) -> Iterator[InputRow]:
    """The rows of a file, or of a folder or name on the hub, whose split is "test" unless another is named."""
    if Path(name).suffix in SUFFIXES:
        return read_rows(name)
    if Path(name).exists() or ":" not in name:
        return read_rows(name, None, "test")
    place, config, *split = name.split(":")
    return read_rows(place, config or None, split[0] if split else "test")


def _question(found: InputRow) -> str | None:
    """What a benchmark asks in a row."""
    prompt, _, fault = prompt_and_columns(found)
    if fault is None:
        return flat(prompt)
    row = found.row or {}
    return next((row[name] for name in COLUMNS if isinstance(row.get(name), str)), None)
