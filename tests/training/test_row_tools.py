"""A column `tools`: training renders each row with its own tools, as the preflight, evaluations and reports do."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from helpers import config, make_model

from trl_distill import OPDTrainer
from trl_distill.data.completions import token_ids
from trl_distill.data.sampling import prompt_ids


TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}{% endif %}"
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
)


def tool(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def rows() -> list[dict]:
    tools = [[tool("a")], None, [tool("b"), tool("c")], []]
    return [
        {
            "prompt": [{"role": "user", "content": "d e"}],
            "tools": json.dumps(tools[i % 4]) if tools[i % 4] is not None else None,
            "teacher_prompt": [{"role": "user", "content": "h"}] if i % 2 else None,
            "completion": [{"role": "assistant", "content": "f"}],
        }
        for i in range(8)
    ]


def test_prompts_have_their_rows_tools(tmp_path, tokenizer, rows):
    tokenizer.chat_template = TEMPLATE
    trainer = OPDTrainer(
        model=make_model(seed=1),
        teacher_model=make_model(seed=2),
        args=config(tmp_path, max_steps=2, per_device_train_batch_size=8, shuffle_dataset=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    seen, on_rollouts = [], trainer.on_rollouts

    def watch(examples, batch):
        on_rollouts(examples, batch)
        for row, *found in zip(
            examples,
            *(batch[f"{whose}_{kind}"] for whose in ("prompt", "teacher_prompt") for kind in ("ids", "mask")),
            strict=True,
        ):
            own, theirs = (ids[mask.bool()].tolist() for ids, mask in (found[:2], found[2:]))
            seen.append((row, own, theirs))

    trainer.on_rollouts = watch
    trainer.train()
    assert len(seen) >= 16
    for row, own, theirs in seen:
        assert own == prompt_ids(tokenizer, row["prompt"], tools=row["tools"])
        assert theirs == prompt_ids(tokenizer, row["teacher_prompt"] or row["prompt"], tools=row["tools"])
    assert len({len(own) for _, own, _ in seen}) == 3  # without tools, with one, with two
    (finding,) = [finding for finding in trainer.preflight.findings if finding.check == "context, student"]
    assert "4" in finding.found  # tokens of the longest, with its tools


def test_completions_of_the_dataset_follow_prompts_with_tools(tokenizer, rows):
    tokenizer.chat_template = TEMPLATE
    for row in rows:
        prompt, completion = token_ids(row, tokenizer, [tokenizer.eos_token_id], 8)
        assert prompt == prompt_ids(tokenizer, row["prompt"], tools=row["tools"])
        assert completion[-1] == tokenizer.eos_token_id
