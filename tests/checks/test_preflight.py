"""Each check of the preflight on a pair that passes and one that does not, with real tokenizers made here."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import WORDS, batch, config, make_model, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from trl_distill import HiddenStates, OPDTrainer, Rollouts
from trl_distill.checks import models as model_checks
from trl_distill.checks import settings as setting_checks
from trl_distill.checks import tokenizers as tokenizer_checks
from trl_distill.checks.findings import Finding, PreflightError, Report
from trl_distill.checks.loaded import measure_distance, own_completions
from trl_distill.heads.fused import DivergenceSpec
from trl_distill.models.hidden_states import add_teacher_forward
from trl_distill.models.properties import context_of, stop_ids
from trl_distill.training.setup import facts_of


def template(name: str) -> str:
    return (
        "{% for m in messages %}" + name + " {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )


def with_template(name: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template(name)
    return tokenizer


def distance(kl: float) -> model_checks.Distance:
    return model_checks.Distance(kl, uniform=9.0, tokens=128, completions=4)


def other_special():
    tokenizer = make_tokenizer()
    tokenizer.unk_token = "a"
    return tokenizer


@pytest.mark.parametrize(
    ("finding", "level", "words"),
    [
        (lambda: tokenizer_checks.same_tokenizer(make_tokenizer(), make_tokenizer()), "ok", "The same 29 ids"),
        (
            lambda: tokenizer_checks.same_tokenizer(make_tokenizer(), make_tokenizer(WORDS[::-1])),
            "error",
            "differ in 28 of 29",
        ),
        (
            lambda: tokenizer_checks.same_tokenizer(make_tokenizer(), make_tokenizer([*WORDS, "+"])),
            "warning",
            "only one of",
        ),
        (
            lambda: tokenizer_checks.same_tokenizer(make_tokenizer([*WORDS, "+"]), make_tokenizer()),
            "warning",
            "29: '+'",
        ),
        (
            lambda: tokenizer_checks.same_tokenizer(make_tokenizer([*WORDS, "+"]), make_tokenizer([*WORDS, "-", "+"])),
            "error",
            "differ in 2 of 31",
        ),
        (lambda: tokenizer_checks.same_tokenizer(make_tokenizer(), None), "warning", "has no tokenizer with it"),
        (
            lambda: tokenizer_checks.same_tokenizer(make_tokenizer(), other_special()),
            "warning",
            "unk_token '.' against 'a'",
        ),
        (lambda: tokenizer_checks.vocabulary(make_tokenizer(), 29, 29), "ok", "29 rows each"),
        (lambda: tokenizer_checks.vocabulary(make_tokenizer(), 32, 40), "ok", "32 rows against the teacher's 40"),
        (lambda: tokenizer_checks.vocabulary(make_tokenizer(), 29, 20), "error", "ends at 19"),
        (lambda: tokenizer_checks.vocabulary(make_tokenizer(), 28, 28), "ok", "28 rows each"),  # 29 ids, as Gemma 3's
        (lambda: tokenizer_checks.stop_tokens(make_tokenizer(), {1}, {1}, True), "ok", "Both end with '<eos>' (1)"),
        (lambda: tokenizer_checks.stop_tokens(make_tokenizer(), {1}, {1, 28}, True), "ok", "compared as one class"),
        (lambda: tokenizer_checks.stop_tokens(make_tokenizer(), {1}, {28}, False), "warning", "completions would grow"),
        (
            lambda: tokenizer_checks.chat_templates(with_template("x"), with_template("x")),
            "ok",
            "render a conversation the same way",
        ),
        (
            lambda: tokenizer_checks.chat_templates(with_template("x"), with_template("y")),
            "warning",
            "differs from its own",
        ),
        (lambda: tokenizer_checks.chat_templates(with_template("x"), make_tokenizer()), "ok", "The teacher has none"),
        (
            lambda: tokenizer_checks.chat_templates(
                with_template("{{ mode or 'x' }}"), with_template("x"), template_kwargs={"mode": "z"}
            ),
            "warning",
            "differs from its own",
        ),
        (lambda: tokenizer_checks.chat_templates(make_tokenizer(), with_template("x")), "skipped", "in the student's"),
        (
            lambda: tokenizer_checks.chat_templates(with_template("x"), with_template("y"), False),
            "warning",
            "Prompts are text",
        ),
        (
            lambda: tokenizer_checks.chat_templates(make_tokenizer(), with_template("y"), False),
            "ok",
            "Prompts are text",
        ),
        (lambda: model_checks.context_length(100, 28, 128, "teacher"), "ok", "128 positions"),
        (lambda: model_checks.context_length(100, 29, -1, "teacher"), "ok", "no limit known"),
        (lambda: model_checks.context_length(100, 29, 128, "teacher"), "error", "Lower `max_completion_length` to 28"),
        (lambda: model_checks.teacher_differs(distance(0.3), "", False), "ok", "0.3 nats"),
        (lambda: model_checks.teacher_differs(distance(3.6), "", False), "ok", "For scale"),
        (lambda: model_checks.teacher_differs(distance(10.2), "", False), "warning", "the same probability (9)"),
        (lambda: model_checks.teacher_differs(distance(10.2), "", False, known=False), "ok", "made-up prompt"),
        (lambda: model_checks.teacher_differs(distance(2e-4), "", False, rough=True), "warning", "may be rounding"),
        (lambda: model_checks.teacher_differs(distance(2e-4), "", False), "ok", "0.0002 nats"),
        (lambda: model_checks.teacher_differs(distance(0.0), "", False), "error", "nothing to learn"),
        (
            lambda: model_checks.teacher_differs(distance(0.0), "there is a reward", False),
            "warning",
            "there is a reward",
        ),
        (lambda: model_checks.teacher_differs(distance(0.0), "", True), "warning", "assume_different_teacher"),
        (
            lambda: model_checks.teacher_differs(distance(0.0), "", False, "math"),
            "error",
            "and the teacher 'math' give the same",
        ),
        (
            lambda: model_checks.teacher_differs(distance(0.0), "it has its own prompts", False, own=True),
            "ok",
            "as expected",
        ),
        (lambda: model_checks.teacher_differs(distance(0.0), "", False, own=True), "error", "the student itself"),
        (
            lambda: tokenizer_checks.same_tokenizer(make_tokenizer(), None, served=True),
            "warning",
            "--served-model-name",
        ),
        (lambda: setting_checks.sampling([]), "ok", "samples of the student"),
        (lambda: setting_checks.sampling(["`top_p=0.9`"]), "warning", "biases"),
        (lambda: setting_checks.groups(8, 4, "group"), "ok", "8 completions each in a generation batch, rewards"),
        (lambda: setting_checks.groups(1, 4, "batch"), "ok", "1 completion each in a generation batch, rewards"),
        (lambda: setting_checks.groups(8, 4, None), "warning", "more prompts teach more"),
    ],
)
def test_checks(finding, level, words):
    found = finding()
    assert found.level == level
    assert words in str(found)
    assert bool(found.advice) == (level != "ok") or "Continuing" in found.found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            -torch.inf,
            r"student's logits are −inf for 2 of 29 ids \(the first: 5, 7\).*probability of exactly 0.*clamp_",
        ),
        (torch.nan, r"student's logits are NaN for 2 of 29 ids.*weights are broken"),
        (torch.inf, r"student's logits are \+inf for 2 of 29 ids.*overflow"),
    ],
)
def test_logits_that_are_not_finite_are_refused_for_what_they_are(value, message):
    logits = torch.randn(1, 4, 29)
    model_checks.check_logits(logits, logits.clone(), "student")
    broken = logits.clone()
    broken[..., [5, 7]] = value
    with pytest.raises(ValueError, match=message):
        model_checks.check_logits(broken, broken.clone(), "student")
    with pytest.raises(ValueError, match="computed from its last hidden state and LM head, are"):
        model_checks.check_logits(logits, broken, "student")
    with pytest.raises(ValueError, match="do not follow from"):
        model_checks.check_logits(logits, 0.5 * logits, "student")


def test_a_bias_of_minus_infinity_on_padding_ids(tmp_path, tokenizer, prompts, teacher):
    student = make_model("bias")
    student.lm_head.bias.data[-1] = -torch.inf
    settings = {"teacher_model": teacher, "train_dataset": prompts, "processing_class": tokenizer}
    with pytest.raises(ValueError, match="student's logits are −inf for 1 of 29 ids"):
        OPDTrainer(model=student, args=config(tmp_path), **settings)
    student.lm_head.bias.data.clamp_(min=-1e4)  # what the message says
    OPDTrainer(model=student, args=config(tmp_path), **settings)


def test_a_report_counts_and_stops_with_all_errors():
    report = Report(
        [Finding("a", "ok", "fine"), Finding("b", "error", "bad", "mend it"), Finding("c", "error", "worse")]
    )
    assert (report.count("ok"), report.count("error"), report.table().row_count) == (1, 2, 3)
    with pytest.raises(PreflightError, match="bad mend it\n\nworse") as error:
        report.stop_on_errors()
    assert error.value.report is report
    Report([Finding("a", "warning", "hm")]).stop_on_errors()


def test_every_id_that_ends_a_turn_counts():
    model = make_model()
    assert stop_ids(model.config, model.generation_config, make_tokenizer()) == {1}
    assert stop_ids(model.config, GenerationConfig(eos_token_id=[1, 28]), None) == {1, 28}
    # id 7 is an ordinary token of this tokenizer: a default that nobody meant
    assert stop_ids(model.config, GenerationConfig(eos_token_id=[1, 7]), make_tokenizer()) == {1}


def test_positions_that_a_scaled_rope_adds():
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
    assert context_of(SimpleNamespace(max_position_embeddings=16, rope_parameters=yarn)) == 128
    assert context_of(SimpleNamespace(max_position_embeddings=256, rope_parameters=yarn)) == 256
    assert context_of(SimpleNamespace(max_position_embeddings=16)) == 16
    assert context_of(SimpleNamespace()) is None


@pytest.fixture
def preflight(tmp_path, tokenizer, prompts, student, teacher):
    """The findings before loading, by check, and the error if there is one."""

    def run(max_completion_length=8, **changes):
        settings = {
            "model": copy.deepcopy(student),
            "teacher_model": copy.deepcopy(teacher),
            "train_dataset": prompts,
            "processing_class": tokenizer,
            **changes,
        }
        trainer = OPDTrainer(
            args=config(tmp_path, max_completion_length=max_completion_length),
            **settings,
        )
        return {finding.check: finding for finding in trainer.preflight.findings}

    return run


@pytest.fixture(scope="module")
def many():
    """700 rows; row 650 has 100 tokens."""
    return Dataset.from_dict({"prompt": ["a b"] * 650 + ["a " * 100] + ["c"] * 49})


def test_all_prompts_are_counted(preflight, many, prompts):
    with pytest.raises(ValueError, match=r"The longest prompt \(row 650 of the training dataset\) has 100 tokens"):
        preflight(train_dataset=many, max_completion_length=29)
    with pytest.raises(
        ValueError, match=r"The longest prompt \(row 650 of the evaluation dataset 'b'\) has 100 tokens"
    ):
        preflight(eval_dataset={"a": prompts, "b": many}, max_completion_length=29)
    found = preflight(train_dataset=many, max_completion_length=28)
    for whose in ("student", "teacher"):
        assert found[f"context, {whose}"].level == "ok"
        assert "up to 100 tokens" in found[f"context, {whose}"].found
        assert "Counted: all 700 of the training dataset." in found[f"context, {whose}"].found


def test_a_teachers_own_prompts_count_for_the_teacher_alone(preflight, prompts):
    hinted = prompts.add_column("teacher_prompt", ["a", "b " * 50] * 16)
    found = preflight(train_dataset=hinted)
    assert "up to 50 tokens" in found["context, teacher"].found
    assert "up to 6 tokens" in found["context, student"].found
    with pytest.raises(
        ValueError, match=r"row 1 of `teacher_prompt` in the training dataset\) has 50 .* the teacher has"
    ):
        preflight(train_dataset=hinted, max_completion_length=79)


def test_what_was_not_counted_is_said(preflight, many, monkeypatch):
    monkeypatch.setattr("trl_distill.checks.prompts.MOST_ROWS", 600)
    found = preflight(train_dataset=many, max_completion_length=100)
    assert "the first 600 of 700 of the training dataset; a longer one may follow" in found["context, student"].found
    found = preflight(train_dataset=many.to_iterable_dataset())
    assert {found[f"context, {whose}"].level for whose in ("student", "teacher")} == {"skipped"}
    assert "not known before training: the dataset is a stream" in found["context, student"].found


def adding(template: str):
    """A tokenizer whose post-processor adds special tokens to text."""
    tokenizer = make_tokenizer([*WORDS[:-2], "<s>", "."])
    special = [("<s>", 27), ("<eos>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


@pytest.mark.parametrize(
    ("template", "text", "level", "words"),
    [
        ("<s> $A", "a b", "ok", ["No prompt begins with BOS twice"]),
        ("$A", "<s> a b", "ok", ["No prompt begins"]),
        ("<s> $A", "<s> a b", "warning", ["32 of 32 prompts of the training dataset begin with BOS twice",
                                          "(row 0: 27 '<s>', 27 '<s>', 2 'a', 3 'b' ...)", "add_bos_token = False"]),
        ("<s> $A <eos>", "a b", "warning", ["32 of 32 prompts of the training dataset end with a stop token",
                                            "(row 0: ... 27 '<s>', 2 'a', 3 'b', 1 '<eos>')", "add_eos_token = False"]),
        ("<s> $A <eos>", "<s> a b", "warning", ["begin with BOS twice", "end with a stop token"]),
    ],
)  # fmt: skip
def test_special_tokens_that_two_parties_add(preflight, caplog, template, text, level, words):
    rows = Dataset.from_dict({"prompt": [text] * 32})
    finding = preflight(train_dataset=rows, processing_class=adding(template))["prompt ids"]
    assert finding.level == level
    assert all(part in str(finding) for part in words)
    assert ("begin with BOS twice" in caplog.text) is ("begin with BOS twice" in finding.found)


def test_the_distance_is_that_of_the_students_own_completions(preflight, student, teacher, prompts):
    """Against full logits on completions of the first prompts."""
    seen = []

    class Listening(HiddenTeacher):
        def score(self, rollouts):
            seen.append(rollouts)
            return super().score(rollouts)

    finding = preflight(max_completion_length=6, teacher_model=Listening(teacher))["teacher differs"]
    (rollouts,) = seen
    texts = [ids[mask.bool()].tolist() for ids, mask in zip(rollouts.input_ids, rollouts.attention_mask, strict=True)]
    tokenized = make_tokenizer()(prompts[:4]["prompt"])["input_ids"]
    assert all(text[: len(prompt)] == prompt for text, prompt in zip(texts, tokenized, strict=True))
    assert 4 <= int(rollouts.mask.sum()) <= 24
    kl, length = [], rollouts.mask.shape[1]
    with torch.no_grad():
        log_q, log_p = (
            model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits.log_softmax(-1)
            for model in (student, teacher)
        )
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)[:, -length - 1 : -1][rollouts.mask].mean().item()
    assert f"{kl:.3g} nats per token on the first {int(rollouts.mask.sum())} tokens" in finding.found


class HiddenTeacher:
    """A teacher of one's own that gives hidden states."""

    gives = HiddenStates

    def __init__(self, model):
        self.model = copy.deepcopy(model).eval()
        add_teacher_forward(self.model)

    def score(self, rollouts):
        with torch.no_grad():
            ids, mask = rollouts.input_ids, rollouts.attention_mask
            return self.model(input_ids=ids, attention_mask=mask, rollouts=rollouts)


def test_measuring_takes_any_rollouts(tmp_path, tokenizer, prompts, student, teacher):
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(tmp_path),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    rollouts = Rollouts.from_inputs(batch())
    judge, _ = trainer.pool.members[0]
    state, weights = torch.get_rng_state(), copy.deepcopy(student.state_dict())
    sampled, _ = own_completions(facts_of(trainer), trainer.model, trainer.accelerator)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in student.state_dict().items())
    assert sampled.mask.shape == (4, 8)
    found = measure_distance(trainer.model, judge, trainer.accelerator, rollouts, DivergenceSpec())
    assert (found.tokens, found.completions) == (int(rollouts.mask.sum()), 3)
    assert 0 < found.kl < 20
    same = measure_distance(
        trainer.model, HiddenTeacher(make_model(seed=1)), trainer.accelerator, rollouts, DivergenceSpec()
    )
    assert abs(same.kl) < 1e-6
    log_q = make_model(seed=1)(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits.log_softmax(
        -1
    )
    log_q = log_q[:, -rollouts.mask.shape[1] - 1 : -1][rollouts.mask]
    uniform = (log_q.exp() * (log_q + math.log(log_q.shape[-1]))).sum(-1).mean().item()
    assert found.uniform == pytest.approx(uniform, rel=1e-4)
