"""Teachers of `trl-distill generate` that are run by vLLM: in this process (`vllm:`), and by its server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers import EOS, WORDS
from processes import succeeds
from with_vllm.vllm_server import OTHER_STOP

from trl_distill.data.datasets import load_splits
from trl_distill.data.sampling import prompt_ids
from trl_distill.synthetic.records import Completion, Refusal
from trl_distill.synthetic.sources.base import Sampling
from trl_distill.synthetic.sources.local import TransformersSource, VLLMSource


PROMPTS = [" ".join(WORDS[2 + i : 5 + i + i % 4]) for i in range(20)]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
LIMIT = 10


@pytest.fixture(scope="module")
def sources(models):
    """The teacher in vLLM and in transformers, greedy."""
    sampling = Sampling(max_tokens=LIMIT, temperature=0.0)
    ours, theirs = VLLMSource(str(models / "teacher"), sampling), TransformersSource(str(models / "teacher"), sampling)
    yield ours, theirs
    ours.close()


def shortfall(source: TransformersSource, prompt: Any, completion: Completion) -> float:
    """
    How far a greedy completion is from being one by transformers' model: the largest difference in log-probability
    between the likeliest token and the one that was chosen, a stop token included. Nats.
    """
    begun = prompt_ids(source.tokenizer, prompt)
    said = source.tokenizer(completion.text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = source.model(torch.tensor([begun + said])).logits[0, len(begun) - 1 :].log_softmax(-1)
    best = log_p.max(-1).values
    behind = [float(best[i] - log_p[i, token]) for i, token in enumerate(said)]
    if completion.stop_reason == "stop":
        behind.append(float(best[-1] - log_p[-1, source.stops].max()))
    else:
        assert len(said) == LIMIT
    return max(behind)


ROUNDING = 0.25  # nats; vLLM computes in bfloat16, in which a likely and a slightly likelier token may change places


@pytest.mark.parametrize("prompts", [PROMPTS, CHATS], ids=["text", "messages"])
def test_greedy_completions_are_the_likeliest_by_transformers(sources, prompts):
    vllm, transformers = sources
    found = [answer[0] for answer in vllm.complete(prompts, 0)]
    assert {completion.stop_reason for completion in found} == {"stop", "length"}
    for stop in (WORDS[EOS], WORDS[OTHER_STOP]):
        assert not any(stop in completion.text for completion in found)
    behind = [shortfall(transformers, *pair) for pair in zip(prompts, found, strict=True)]
    assert max(behind) < ROUNDING
    # the next prompt's completion is not among the likeliest of this one
    others = [shortfall(transformers, *pair) for pair in zip(prompts, found[1:] + found[:1], strict=True)]
    assert sum(other > ROUNDING for other in others) > 0.9 * len(prompts)


def test_a_prompt_that_is_too_long_is_refused_alone(sources):
    vllm, _ = sources
    long, few = "a " * 500, PROMPTS[:3]
    alone = vllm.complete(few, 0)
    found = vllm.complete([few[0], long, *few[1:]], 0)
    assert isinstance(found[1], Refusal)
    assert found[1].kind == "refused by vLLM"
    assert [found[0], *found[2:]] == alone
    assert vllm.complete(few, 0) == alone  # nothing of the refused request is left in the engine


def test_a_seed_is_that_of_a_prompt_in_whatever_batch(models, sources, monkeypatch):
    vllm, _ = sources
    monkeypatch.setattr(vllm, "sampling", Sampling(n=3, max_tokens=LIMIT))
    first = vllm.complete(PROMPTS, 5)
    assert [len(answer) for answer in first] == [3] * len(PROMPTS)
    assert len({completion.text for answer in first for completion in answer}) > 20
    again = vllm.complete(PROMPTS[4:6], 9)
    same = [a == b for one, other in zip(first[4:6], again, strict=True) for a, b in zip(one, other, strict=True)]
    assert sum(same) >= 4  # of 6; rounding may differ with the batch
    assert vllm.complete(PROMPTS[4:6], 109) != again


def generated(folder: Path, teacher: str, *options: str) -> list[dict[str, Any]]:
    """The rows that the command writes, for messages."""
    rows = [json.dumps({"prompt": chat, "number": i}) for i, chat in enumerate(CHATS)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    command = [sys.executable, "-m", "trl_distill.cli", "generate", "--dataset_name", str(folder / "prompts.jsonl")]
    how = ("--output_dir", str(folder / "out"), "--max_completion_length", str(LIMIT), "--keep_truncated", "true")
    free = ("--near_duplicates", "0", "--min_characters", "0", "--max_repetition", "1")
    succeeds([*command, "--teacher_model_name_or_path", teacher, *how, *free, *options], cwd=folder)
    assert len(load_splits(str(folder / "out"))["train"]) > 0
    return [row for path in sorted((folder / "out" / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("kind", ["vllm", "server"])
def test_the_command(models, sources, request, tmp_path, kind):
    address = f"vllm:{models / 'teacher'}" if kind == "vllm" else f"{request.getfixturevalue('server').url}/v1#teacher"
    rows = generated(tmp_path, address, "--temperature", "0")
    assert len(rows) > len(CHATS) / 2
    for row in rows:
        words = row["completion"][0]["content"]
        how = "length" if len(words.split()) == LIMIT else "stop"
        assert shortfall(sources[1], CHATS[row["number"]], Completion(words, how)) < ROUNDING
