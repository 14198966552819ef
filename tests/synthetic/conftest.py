"""What the tests of the pipeline share: prompts in a file, a teacher made of a function, and a run in one call."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sums import REWARD, problems, solve

from trl_distill.synthetic import Completion, GenerateConfig, pipeline
from trl_distill.synthetic.sources.base import seeds_of
from trl_distill.synthetic.work_folder import seed_of


class FunctionTeacher:
    """Completes with `answer(prompt, seed)`, a text, a `Completion` or a `Refusal`; notes what it was asked."""

    def __init__(self, answer, n: int = 1):
        self.answer, self.n = answer, n
        self.asked: list[Any] = []

    def complete(self, prompts, seed):
        self.asked += prompts
        seeds = seeds_of(seed, len(prompts))
        return [self._one(prompt, seed_of(own, prompt)) for prompt, own in zip(prompts, seeds, strict=True)]

    def _one(self, prompt, seed):
        said = [self.answer(prompt, seed + i) for i in range(self.n)]
        if not isinstance(said[0], str | Completion):
            return said[0]
        return [Completion(s, "stop") if isinstance(s, str) else s for s in said]

    def close(self):
        pass


class Bench:
    """A folder with prompts, and the pipeline run in it."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.out = folder / "out"

    def prompts(self, rows: list[Any], name: str = "prompts.jsonl") -> Path:
        """Write rows; a string is written as the line that it is."""
        path = self.folder / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return path

    def teach(self, answer) -> list[FunctionTeacher]:
        """Let a function be the teacher; returns those that were loaded, as they are."""
        loaded: list[FunctionTeacher] = []

        def load(address, sampling, config):
            loaded.append(FunctionTeacher(lambda p, s: answer(p, s, address.model), sampling.n))
            return loaded[-1]

        self.monkeypatch.setattr(pipeline, "load_source", load)
        self.monkeypatch.setattr(pipeline, "check_source", lambda address: None)
        return loaded

    def config(self, **settings: Any) -> GenerateConfig:
        defaults: dict[str, Any] = {
            "dataset_name": str(self.folder / "prompts.jsonl"),
            "output_dir": str(self.out),
            "chunk_size": 4,
        }
        if "teacher_models" not in settings:
            defaults["teacher_model_name_or_path"] = "someone"
        return GenerateConfig(**{**defaults, **settings})

    def run(self, **settings: Any) -> dict[str, Any]:
        """Run, and check that the counts of all stages fit each other; returns `counts.json`."""
        counts = pipeline.run_pipeline(self.config(**settings), Console(file=io.StringIO()))
        check_counts(counts, len(self.rows()))
        return counts

    def rows(self) -> list[dict[str, Any]]:
        return [row for path in sorted((self.out / "data").iterdir()) for row in pq.read_table(path).to_pylist()]

    def skipped(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.out / "skipped.jsonl").read_text().splitlines()]


def check_counts(counts: dict[str, Any], rows: int) -> None:
    """Every stage accounts for all that came in, and passes on what the next one gets."""
    stages = {stage["stage"]: stage for stage in counts["stages"]}
    for stage in stages.values():
        assert stage["in"] == stage["kept"] + sum(stage["dropped"].values()), stage
    followed = [
        s for s in counts["stages"] if s["stage"] not in ("new prompts", "read human data", "mix in human data")
    ]
    for before, after in itertools.pairwise(followed):
        if before["stage"].startswith(("evolve", "keep rewrites", "keep the last rewrites", "revise")):
            continue  # what a round could not rewrite goes on as it is; then the unit changes
        if before["stage"] not in ("equal prompts", "ask the teachers", "compare", "filter"):  # there the unit changes
            assert before["kept"] == after["in"], (before, after)
    if "keep all" in stages:
        assert stages["filter"]["kept"] == stages["keep all"]["in"]
    last = counts["stages"][-1]
    assert last["kept"] == counts["rows"] == sum(counts["writers"].values()) == rows


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    """Datasets that a test reads are cached in its own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """Writes a module with reward functions to import by name, for this test only."""
    written: set[str] = set()

    def write(code: str, name: str = "my_verifier") -> None:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.chdir(tmp_path)
        written.add(name)
        sys.modules.pop(name, None)

    yield write
    for name in written:
        sys.modules.pop(name, None)  # other tests have modules of that name, too


@pytest.fixture
def sums(bench, reward):
    reward(REWARD)
    bench.prompts(problems(10))
    bench.teach(solve)
    bench.settings = {"reward_funcs": ["my_verifier.right"], "completions_per_prompt": 3}
    return bench
