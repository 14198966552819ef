"""Folders that an older version left: settings that it did not have, and that are not used, change nothing."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from trl_distill.synthetic import GenerateConfig
from trl_distill.synthetic.pipeline import Pipeline, _settings
from trl_distill.synthetic.stages.verify import load_scorer


FIRST = [  # what the first version wrote into settings.json
    *("dataset_name", "dataset_config", "dataset_split", "max_prompts", "new_prompts", "new_prompts_seeds"),
    *("teacher_model_name_or_path", "teacher_models", "teacher_assignment", "completions_per_prompt"),
    *("max_completion_length", "temperature", "top_p", "batch_size", "chunk_size", "seed", "request_options"),
    "dataset_digest",
]


JUDGED = {"judge": "http://h:1/v1#j", "keep": "best", "completions_per_prompt": 2, "judge_prompt": "judge.txt"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "edda9b1c9311f25a92d8899372bc9264"),
        (JUDGED, "6b46fc01ee2437fc3b632fb50e98fc91"),
        (
            {"human_data": "human.jsonl", "human_share": 0.2, "request_options": {"a": 1}},
            "661fff72fcdc3e3c0e2cb5c76395f072",
        ),
    ],
)
def test_a_finished_dataset_of_the_first_version_is_recognised(tmp_path, monkeypatch, settings, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "human.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "judge.txt").write_text("{prompt} {completion}\n")
    assert fingerprint(**settings) == expected
    used = {"evolve": 1} if "judge" not in settings else {"judge_mode": "pairwise"}
    changed = {**settings, **used}
    changed.pop("judge_prompt", None)
    assert fingerprint(**changed) not in (expected, fingerprint(**{k: changed[k] for k in changed if k not in used}))


def fingerprint(**settings):
    given = {"dataset_name": "prompts.jsonl", "output_dir": "out", "teacher_model_name_or_path": "http://h:1/v1#m"}
    config = GenerateConfig(**given, **settings)
    pipeline = Pipeline(config, Console(file=io.StringIO()))
    pipeline.scorer = load_scorer(config)
    return pipeline._fingerprint(_settings(config))


def test_a_work_folder_of_the_first_version_goes_on(bench):
    bench.prompts([f'{{"prompt": "question {i}"}}' for i in range(6)])
    loaded = bench.teach(lambda prompt, seed, model: f"an answer to {prompt}")
    bench.run()
    expected = bench.rows()
    path = bench.folder / "out.work" / "settings.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name in FIRST}))
    bench.out.rename(bench.folder / "before")
    loaded.clear()
    bench.run()
    assert (bench.rows(), loaded) == (expected, [])
    bench.out.rename(bench.folder / "again")
    with pytest.raises(ValueError, match="`evolve` was 0, now 1"):
        bench.run(evolve=1)
