"""Training with a served teacher against the local one, its faults, and the demo's models with every kind."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import VOCAB, config, gradients, in_training, relative_error
from peft import LoraConfig
from teacher_runs import trained
from teacher_server import TeacherServer
from transformers import AutoModelForCausalLM

from trl_distill import AdapterOff, OPDTrainer, ServedTeacher, TeacherAnswerError, TeacherUnavailable


@pytest.fixture
def served(teacher):
    with TeacherServer(copy.deepcopy(teacher), max_logprobs=VOCAB) as server:
        yield server


@pytest.mark.parametrize(
    ("settings", "local"),
    [
        ({"kl_estimator": "sampled"}, {"kl_estimator": "sampled"}),
        ({"kl_estimator": "sampled", "kl_discount": 1.0}, {"kl_estimator": "sampled", "kl_discount": 1.0}),
        ({"kl_estimator": "topk", "kl_top_k": VOCAB}, {"kl_estimator": "full"}),
        (
            {"kl_estimator": "topk", "kl_top_k": VOCAB, "num_iterations": 2},
            {"kl_estimator": "full", "num_iterations": 2},
        ),
    ],
    ids=str,
)
def test_a_served_teacher_trains_as_the_local_one(make, served, settings, local):
    """Where its top k are all ids, `topk` is exact."""
    expected = trained(make(**local, gradient_accumulation_steps=2))[0]
    k = settings.get("kl_top_k", 0)
    found = trained(
        make(teacher_model=ServedTeacher(served.url, "teacher", k), **settings, gradient_accumulation_steps=2)
    )[0]
    for a, b in zip(expected, found, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_served_teacher_that_cannot_give_what_is_asked(make, served):
    teacher = ServedTeacher(served.url, "teacher")
    with pytest.raises(ValueError, match="Use kl_estimator='topk' or 'sampled'"):
        make(teacher_model=teacher)
    with pytest.raises(ValueError, match="scores at temperature 1 only"):
        make(teacher_model=teacher, kl_estimator="sampled", temperature=0.7)
    with pytest.raises(ValueError, match=r"is a server\. Name the model that it serves"):
        make(teacher_model=served.url, kl_estimator="sampled")
    with pytest.raises(ValueError, match=r"requests the 0 most likely ids .* `kl_top_k` is 4"):
        make(teacher_model=teacher, kl_estimator="topk", kl_top_k=4)


def test_a_teacher_that_stays_away_leaves_a_checkpoint_from_which_the_run_goes_on(make, served, tmp_path):
    """The run with the break ends with the weights of the run without."""

    def of_run(**changes):
        quick = ServedTeacher(served.url, "teacher", retries=1, backoff=0.01, timeout=2)
        return make(teacher_model=quick, kl_estimator="sampled", max_steps=4, **changes)

    _, expected = trained(of_run())
    broken = of_run()
    score, asked = broken.teacher.score, []

    def score_until_the_third_batch(rollouts):
        asked.append(len(rollouts))
        if len(asked) == 3:
            served.fail("drop")
        return score(rollouts)

    broken.teacher.score = score_until_the_third_batch
    with pytest.raises(
        TeacherUnavailable, match=r"Training stopped after step 2\. Everything so far is in .*checkpoint-2"
    ):
        broken.train()
    served.fail("", times=0)
    resumed = of_run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = torch.cat([p.detach().flatten() for p in resumed.model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fault", [("status", 500), ("status", (429, "0")), ("drop", None), ("break", None)], ids=str)
def test_faults_that_pass_change_nothing_in_training(make, served, fault):
    def of_run():
        return make(teacher_model=ServedTeacher(served.url, "teacher", backoff=0.01), kl_estimator="sampled")

    expected, trainer = trained(of_run())[0], of_run()
    served.fail(fault[0], times=2, value=fault[1])
    assert trained(trainer)[0] == expected


@pytest.mark.parametrize("fault", ["shuffle", "cut"])
def test_nothing_is_trained_on_a_wrong_answer(make, served, fault):
    trainer = make(teacher_model=ServedTeacher(served.url, "teacher"), kl_estimator="sampled")
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    served.fail(fault)
    with pytest.raises(TeacherAnswerError):
        trainer.train()
    assert torch.equal(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), before)


def test_a_wrong_answer_leaves_a_checkpoint(make, served, tmp_path):
    trainer = make(teacher_model=ServedTeacher(served.url, "teacher"), kl_estimator="sampled", max_steps=3)
    score, asked = trainer.teacher.score, []

    def score_until_the_second_batch(rollouts):
        asked.append(len(rollouts))
        if len(asked) == 2:
            served.fail("cut")
        return score(rollouts)

    trainer.teacher.score = score_until_the_second_batch
    with pytest.raises(TeacherAnswerError, match=r"stopped after step 1\. Everything so far is in .*checkpoint-1"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


# -- the demo's models, every kind and estimator ---------------------------------------------------------------------


MODELS = Path(__file__).parents[2] / "scripts" / "studies" / "tasks" / "models"


DEMO_PROMPTS = ["State the final answer to the following arithmetic problem: 1234 + 5678 =", "1 + 1 ="] * 2


def demo_gradient(tmp_path, kind: str, settings: dict, stack: ExitStack) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one update of the demo's student, or of an adapter on it."""
    student = AutoModelForCausalLM.from_pretrained(MODELS / "student")
    teacher = AutoModelForCausalLM.from_pretrained(MODELS / "student" if "base" in kind else MODELS / "teacher")
    rows = {"prompt": DEMO_PROMPTS, "teacher": ["one", "two", {"one": 0.4, "two": 0.6}, "one"]}
    extra: dict = {}
    if "base" in kind:
        torch.manual_seed(5)
        extra["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if kind == "base, adapter off":
        teacher = AdapterOff()
    if kind == "several":
        teacher = {"one": teacher, "two": copy.deepcopy(teacher)}
    if kind == "served":
        server = stack.enter_context(TeacherServer(teacher, max_logprobs=100, max_model_len=512))
        k = settings["kl_top_k"] if settings["kl_estimator"] == "topk" else 0
        teacher = ServedTeacher(server.url, "teacher", k)
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(tmp_path, teacher_offload=kind == "offloaded", top_k=0, **settings),
        train_dataset=Dataset.from_dict({"prompt": DEMO_PROMPTS, "teacher": ["one"] * 4}),
        **extra,
    )
    in_training(trainer)
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions(
        [{"prompt": p, "teacher": t} for p, t in zip(*rows.values(), strict=True)]
    )
    loss = trainer.rollout_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "estimator"),
    [
        *[(kind, e) for kind in ("offloaded", "several", "base, adapter off") for e in ("full", "topk", "sampled")],
        *[("served", e) for e in ("topk", "sampled")],
    ],
)
def test_the_demos_models_with_every_kind_and_estimator(tmp_path, kind, estimator, discount):
    """Where the served teacher names its own ids, all 74 of them make `topk` exact; it cannot give `full`."""
    settings = {"kl_estimator": estimator, "kl_discount": discount, "kl_top_k": 74 if kind == "served" else 4}
    with ExitStack() as stack:
        loss, gradient = demo_gradient(tmp_path, kind, settings, stack)
        resident = "base, resident" if "base" in kind else "resident"
        expected_loss, expected = demo_gradient(tmp_path, resident, settings, stack)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert relative_error(gradient, expected) < 1e-4
    assert expected.norm() > 1e-3
