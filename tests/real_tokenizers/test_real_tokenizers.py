"""Qwen3's, Llama 3's, Gemma 3's, DeepSeek-V3's and gpt-oss's tokenizers: checks, templates, stop tokens, answers."""

from __future__ import annotations

import json
import math

import pytest
from datasets import Dataset
from real_tokenizers.families import CHAT, FAMILIES, tiny_model

from trl_distill.checks.findings import PreflightError
from trl_distill.checks.tokenizers import chat_templates, same_tokenizer
from trl_distill.data import sampling
from trl_distill.data.completions import token_ids
from trl_distill.data.datasets import with_prompts
from trl_distill.data.sampling import answer_texts, prompt_ids
from trl_distill.synthetic.records import Completion
from trl_distill.synthetic.sources.base import Sampling
from trl_distill.synthetic.sources.local import TransformersSource


pytestmark = pytest.mark.slow


QUESTION = "What is 2 + 2?"
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]


def prompts_of(name: str) -> list:
    return [MESSAGES if name in CHAT else QUESTION] * 8


def findings_of(trainer) -> dict:
    return {finding.check: finding for finding in trainer.preflight.findings}


@pytest.mark.parametrize("student", FAMILIES)
def test_ids_of_every_pair_are_compared(tokenizer_of, student):
    ours = tokenizer_of(student)
    for name in FAMILIES:
        theirs = tokenizer_of(name)
        finding = same_tokenizer(ours, theirs)
        if name == student:
            assert finding.level == "ok"
            continue
        ids = range(max(len(ours), len(theirs)))
        of_both = ((i, ours.convert_ids_to_tokens(i), theirs.convert_ids_to_tokens(i)) for i in ids)
        place, a, b = next((i, a, b) for i, a, b in of_both if a != b)
        assert finding.level == "error"
        assert f"student against teacher: {place}: {a!r} against {b!r};" in finding.found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pair_with_one_tokenizer_passes_and_trains(make_trainer, saved_teacher, name):
    trainer = make_trainer(name, prompts_of(name), saved_teacher(name))
    found = findings_of(trainer)
    for check in ("tokenizer", "vocabulary", "chat template", "prompt ids", "stop tokens"):
        assert found[check].level == "ok", found[check]
    trainer.train()
    (loss,) = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert 0 < loss < math.inf


@pytest.mark.parametrize(("student", "teacher"), list(zip(FAMILIES, [*list(FAMILIES)[1:], "qwen3"], strict=True)))
def test_a_teacher_with_another_tokenizer_is_refused(make_trainer, saved_teacher, student, teacher):
    with pytest.raises(PreflightError, match=r"The tokenizers of student \(\d+ ids\) and teacher \(\d+\) differ in"):
        make_trainer(student, prompts_of(student), saved_teacher(teacher))


@pytest.mark.parametrize("name", CHAT)
def test_bos_is_doubled_where_template_and_tokenizer_both_add_it(make_trainer, own_tokenizer_of, name):
    tokenizer = own_tokenizer_of(name)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    finding = findings_of(make_trainer(name, [text] * 8))["prompt ids"]
    if name != "gemma3":  # the others' tokenizers, as they are here, leave BOS to the template
        assert finding.level == "ok"
        return
    assert finding.level == "warning"
    assert "(row 0: 2 '<bos>', 2 '<bos>', 105 '<start_of_turn>'" in finding.found
    assert findings_of(make_trainer(name, [MESSAGES] * 8))["prompt ids"].level == "ok"
    tokenizer.add_bos_token = False  # as the finding says
    assert findings_of(make_trainer(name, [text] * 8))["prompt ids"].level == "ok"


@pytest.mark.parametrize(
    ("name", "stop"),
    [("qwen3", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma3", "<end_of_turn>"), ("gptoss", "<|return|>")],
)
def test_stop_tokens_of_a_chat_model_and_a_base_model_are_merged(make_trainer, name, stop):
    family = FAMILIES[name]
    trainer = make_trainer(name, prompts_of(name), tiny_model(name, seed=2, stops=family.base_stops))
    finding = findings_of(trainer)["stop tokens"]
    assert finding.level == "ok"
    assert f"'{stop}' ({trainer.tokenizer.convert_tokens_to_ids(stop)})" in finding.found
    assert "compared as one class" in finding.found
    merged = sorted({*family.stops, *family.base_stops})
    assert trainer.estimator.stops == merged
    assert sorted(trainer.eos_token_ids) == merged
    trainer.train()
    assert sorted(trainer.model.generation_config.eos_token_id) == merged


@pytest.mark.parametrize("name", CHAT)
def test_a_datasets_answer_continues_the_prompt_of_a_rollout(make_trainer, tokenizer_of, name):
    tokenizer, stops = tokenizer_of(name), FAMILIES[name].stops
    row = {"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "Four."}]}
    prompt, completion = token_ids(row, tokenizer, stops, None, {"enable_thinking": False})
    trainer = make_trainer(name, [MESSAGES] * 8, chat_template_kwargs={"enable_thinking": False})
    assert prompt == trainer.token_ids_of([MESSAGES])[0] == prompt_ids(tokenizer, MESSAGES, {"enable_thinking": False})
    assert completion[-1] in stops
    assert tokenizer.decode(completion[:-1]) == "Four."


def test_thinking_is_rendered_as_asked_for(make_trainer, tokenizer_of):
    tokenizer, opened = tokenizer_of("qwen3"), "<|im_start|>assistant\n"
    for kwargs, end in (({}, opened), ({"enable_thinking": False}, f"{opened}<think>\n\n</think>\n\n")):
        (ids,) = make_trainer("qwen3", [MESSAGES] * 8, chat_template_kwargs=kwargs).token_ids_of([MESSAGES])
        assert tokenizer.decode(ids) == f"<|im_start|>user\n{QUESTION}<|im_end|>\n{end}"
    thought = "<think>\nTwo and two.\n</think>\n\nFour."
    row = {"prompt": MESSAGES, "completion": [{"role": "assistant", "content": thought}]}
    _, completion = token_ids(row, tokenizer, (151645,), None)
    assert tokenizer.decode(completion) == f"{thought}<|im_end|>"


def test_a_teachers_template_is_compared_in_the_mode_of_the_run(own_tokenizer_of):
    student, teacher = own_tokenizer_of("qwen3"), own_tokenizer_of("llama3")
    teacher.chat_template = student.chat_template.split("{%- if enable_thinking is defined")[0] + "{%- endif %}"
    assert chat_templates(student, teacher).level == "ok"
    assert chat_templates(student, teacher, template_kwargs={"enable_thinking": False}).level == "warning"


def test_tools_of_a_row_reach_the_template(make_trainer, tokenizer_of, monkeypatch):
    tokenizer = tokenizer_of("qwen3")
    ids = prompt_ids(tokenizer, MESSAGES, tools=TOOLS)
    assert ids == prompt_ids(tokenizer, MESSAGES, tools=json.dumps(TOOLS))
    assert '"name": "add"' in tokenizer.decode(ids)
    assert prompt_ids(tokenizer, MESSAGES, tools=[]) == prompt_ids(tokenizer, MESSAGES)
    trainer = make_trainer("qwen3", [MESSAGES] * 8, columns={"tools": [json.dumps(TOOLS)] * 8})
    seen, on_rollouts = [], trainer.on_rollouts

    def listening(rows, batch):
        seen.extend(zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True))
        on_rollouts(rows, batch)

    monkeypatch.setattr(trainer, "on_rollouts", listening)
    trainer.train()
    assert [row[mask].tolist() for row, mask in seen] == [ids] * 4


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_keep_every_token_but_stops_and_padding(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    for text in (FAMILIES[name].marked, " a , b . c ? I do n't , it 's\n\n\n  y", "x [ 1 , 2 ] !\n```\n"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for stop in FAMILIES[name].stops:
            assert answer_texts(tokenizer, [[*ids, stop]], FAMILIES[name].stops) == [text]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_data_engine_keeps_thoughts_and_tool_calls(tokenizer_of, saved_teacher, monkeypatch, name):
    text, stop = FAMILIES[name].marked, FAMILIES[name].stops[0]
    ids = tokenizer_of(name)(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(sampling, "sample_ids", lambda *_: [[([*ids, stop], False), (ids, True)]])
    (answer,) = TransformersSource(saved_teacher(name), Sampling(n=2, max_tokens=64)).complete([QUESTION], 0)
    assert answer == [Completion(text, "stop"), Completion(text, "length")]


@pytest.mark.parametrize("name", CHAT)
def test_sharegpt_rows_and_content_in_parts_give_the_same_ids(tokenizer_of, name):
    turns = [("user", "Hello."), ("assistant", "Hello!"), ("user", QUESTION)]
    plain = [{"role": role, "content": text} for role, text in turns]
    names = {"user": "human", "assistant": "gpt"}
    written = {
        "messages": plain,
        "conversations": [{"from": names[role], "value": text} for role, text in turns],
        "prompt": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns],
    }
    expected = prompt_ids(tokenizer_of(name), plain)
    for column, messages in written.items():
        dataset = with_prompts(Dataset.from_dict({column: [messages]}), "the training dataset")
        assert prompt_ids(tokenizer_of(name), dataset[0]["prompt"]) == expected, column
