"""Teachers with another tokenizer of every kind: served, several, beside ones with the student's tokenizer."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from helpers import config, gradients, in_training, make_model, relative_error
from teacher_server import TeacherServer
from text_models import MERGES, STUDENT, TEACHER, TEACHER_STOPS, make_bpe, make_pair

from trl_distill import OPDTrainer, ServedTeacher
from trl_distill.alignment.completions import align
from trl_distill.checks.findings import PreflightError
from trl_distill.estimators.cross_tokenizer import ByTokenizer, ClosedIds, CrossTokenizer
from trl_distill.objective.divergences import summands
from trl_distill.rollouts import MicroBatch
from trl_distill.teachers.local import LocalTeacher


PROMPT, LENGTH, EOS = "ab", 3, 1
COMPLETIONS = [
    list(ids)
    for length in range(1, LENGTH + 1)
    for ids in itertools.product(range(len(STUDENT)), repeat=length)
    if EOS not in ids[:-1] and (ids[-1] == EOS or length == LENGTH)
]


@pytest.fixture
def made(tmp_path):
    return make_pair(tmp_path / "teacher")


@pytest.fixture
def same_as_student(tmp_path):
    """A teacher with the student's tokenizer."""
    model = make_model("untied", seed=3, vocab_size=len(STUDENT), hidden_size=8, head_dim=4)
    make_bpe(STUDENT, MERGES["student"], "<eos>").save_pretrained(tmp_path / "same")
    model.config._name_or_path = str(tmp_path / "same")
    return model


@pytest.fixture
def third(tmp_path):
    """A teacher with a third tokenizer, of single letters."""
    tokens = ["<pad>", "<end>", "b", "a"]
    model = make_model("untied", seed=4, vocab_size=len(tokens), hidden_size=8, head_dim=4)
    make_bpe(tokens, [], "<end>").save_pretrained(tmp_path / "third")
    model.config._name_or_path = str(tmp_path / "third")
    return model


def build(folder, made, teachers, columns=None, **changes) -> OPDTrainer:
    settings = {"loss_type": "dr_grpo", "top_k": 0, "max_completion_length": LENGTH, "max_steps": 1, **changes}
    trainer = OPDTrainer(
        model=made[0],
        teacher_model=teachers,
        args=config(folder, cross_tokenizer=True, **settings),
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 8, **(columns or {})}),
        processing_class=made[1],
    )
    return in_training(trainer)


def batch_of(trainer, rows: list[list[int]], **extra) -> dict:
    """Rows after one prompt, as TRL gives them, with the teachers' own prompts."""
    own = trainer.processing_class(PROMPT).input_ids
    trainer.safeguards.watch = lambda _: None  # TRL has recorded nothing of rows that are made here
    longest = max(map(len, rows))
    mask = (torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]).long()
    prompts = torch.tensor([own] * len(rows))
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "completion_mask": mask,
        "advantages": torch.zeros(len(rows)),
        "num_items_in_batch": mask.sum(),
        **extra,
    }
    trainer.on_rollouts([{"prompt": PROMPT, "teacher": extra.get("teacher")}] * len(rows), batch)
    return batch


def gradient_of(trainer, batch) -> torch.Tensor:
    trainer.model.zero_grad()
    trainer.rollout_loss(trainer.model, batch).backward()
    return gradients(trainer.model)


def expected_gradient(trainer) -> torch.Tensor:
    """Σ_y q(y) ∇loss(y) over all completions, by the trainer's own loss."""
    trainer.model.zero_grad()
    own = trainer.processing_class(PROMPT).input_ids
    with torch.no_grad():
        weights = []
        for y in COMPLETIONS:
            logits = trainer.model(input_ids=torch.tensor([[*own, *y]])).logits[0, len(own) - 1 : -1]
            weights.append(logits.log_softmax(-1).gather(1, torch.tensor(y)[:, None]).sum().exp())
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    for y, weight in zip(COMPLETIONS, weights, strict=True):
        (trainer.rollout_loss(trainer.model, batch_of(trainer, [y])) * LENGTH * weight).backward()
    return gradients(trainer.model)


def test_a_served_teacher_has_the_gradient_of_the_same_model_here(tmp_path, made):
    """In expectation: it gives no distributions, so that nothing is summed exactly, and both of its stops count."""
    here = expected_gradient(build(tmp_path, made, made[2]))
    with TeacherServer(made[2], name=str(tmp_path / "teacher")) as server:
        made[2].generation_config.save_pretrained(tmp_path / "teacher")
        served = ServedTeacher(server.url, model=str(tmp_path / "teacher"))
        trainer = build(tmp_path, made, served)
        found = expected_gradient(trainer)
        stopped = [body for body in server.asked if any(row[-1] == TEACHER_STOPS[1] for row in body["prompt"])]
    assert relative_error(found, here) < 1e-4
    assert stopped
    assert isinstance(trainer.estimator, CrossTokenizer)


def test_a_served_teacher_scores_spans_as_the_model_itself_does(tmp_path, made):
    rows = [[4, 2, 1], [2, 3, 4], [3, 4, 2], [1]]
    resident = build(tmp_path, made, made[2])
    batch = batch_of(resident, rows)
    (expected,) = resident.pool.score(MicroBatch.from_inputs(batch), training=True)
    with TeacherServer(made[2], name=str(tmp_path / "teacher")) as server:
        made[2].generation_config.save_pretrained(tmp_path / "teacher")
        trainer = build(tmp_path, made, ServedTeacher(server.url, model=str(tmp_path / "teacher")))
        (found,) = trainer.pool.score(MicroBatch.from_inputs(batch_of(trainer, rows)), training=True)
        trainer.train()
    assert torch.equal(found.signal.starts, expected.signal.starts)
    torch.testing.assert_close(found.signal.log_p, expected.signal.log_p, rtol=1e-4, atol=1e-5)
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["distill/exact_tokens"] == 0


def test_a_served_teacher_without_its_tokenizer_is_refused(tmp_path, made):
    with (
        TeacherServer(made[2], name="unknown") as server,
        pytest.raises(PreflightError, match=r"has no tokenizer with it.*--served-model-name"),
    ):
        build(tmp_path, made, ServedTeacher(server.url, model="unknown"))


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_several_teachers_give_the_weighted_sum_of_their_gradients(tmp_path, made, same_as_student, third, discount):
    """Two other tokenizers, and the student's own beside them; each reads its own prompt, and spans are its own."""
    teachers = {"texts": made[2], "same": same_as_student, "third": third}
    weights = {"texts": 0.5, "same": 0.3, "third": 0.2}
    rows = [[4, 2, 1], [2, 3, 4], [3, 4, 2], [1]]
    expected: torch.Tensor | float = 0.0
    for name, weight in weights.items():
        alone = build(tmp_path, made, teachers[name], kl_discount=discount)
        expected = expected + weight * gradient_of(alone, batch_of(alone, rows))
    trainer = build(tmp_path, made, teachers, teacher_weights=weights, kl_discount=discount)
    assert isinstance(trainer.estimator, ByTokenizer)
    assert [teacher.prompts for teacher, _ in trainer.pool.members] == [
        "text_prompt_0",
        "teacher_prompt",
        "text_prompt_1",
    ]
    assert relative_error(gradient_of(trainer, batch_of(trainer, rows)), expected) < 1e-5


def test_rows_are_routed_among_tokenizers(tmp_path, made, same_as_student):
    names = ["texts", "same"] * 4
    trainer = build(
        tmp_path, made, {"texts": made[2], "same": same_as_student}, {"teacher": names}, teacher_offload=True
    )
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert {"distill/reverse_kl/texts", "distill/reverse_kl/same", "distill/non_canonical"} <= set(row)


def test_with_the_students_tokenizer_alone_the_option_changes_nothing_and_says_so(tmp_path, made, same_as_student):
    trainer = build(tmp_path, made, same_as_student)
    (said,) = [f for f in trainer.preflight.findings if "id by id" in f.found]
    assert said.level == "warning"
    assert not isinstance(trainer.estimator, CrossTokenizer | ByTokenizer)


def test_a_negative_weight_of_such_a_teacher_is_refused(tmp_path, made, same_as_student):
    teachers = {"texts": made[2], "same": same_as_student}
    with pytest.raises(ValueError, match=r"negative weight.*would be paid"):
        build(tmp_path, made, teachers, teacher_weights={"texts": -0.5, "same": 1.5})
    with pytest.raises(ValueError, match=r"negative weight.*would be paid"):
        build(tmp_path, made, teachers, {"teacher": [{"texts": -0.5, "same": 1.5}] * 8})
    build(tmp_path, made, teachers, teacher_weights={"texts": 1.5, "same": -0.5})


DIVERGENCES = [("forward_kl", None), ("jsd", 0.3), ("skewed_forward_kl", 0.1), ("skewed_reverse_kl", 0.1)]
DIVERGENCES += [("mixed", 0.5)]


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
def test_other_divergences_are_those_over_closed_ids_stops_and_the_rest(tmp_path, made, divergence, alpha):
    """By naive autograd on full logits, at positions where both tokenizations begin anew."""
    student, own, _, other = made
    trainer = build(tmp_path, made, made[2], divergence=divergence, divergence_alpha=alpha)
    teacher = trainer.teacher.module
    assert isinstance(trainer.estimator, ClosedIds)
    rows = [[0, 4, 1], [1]]  # a token for padding, "ab", and the end: both begin anew at once and behind the first
    found = gradient_of(trainer, batch_of(trainer, rows))
    student.zero_grad()
    shared = trainer.teacher.shared
    prompt, theirs = own(PROMPT).input_ids, other(PROMPT).input_ids
    read = []
    for row in rows:
        aligned = align(trainer.teacher.pair, row[:-1], True)
        read += [
            ([*prompt, *row[:start]], [*theirs, *aligned.paths[place.path][: place.count]])
            for start, place in zip(aligned.starts, aligned.places, strict=False)
        ]
    assert len(read) == 3

    def classes(logits, ids, stops):
        p = logits.double().softmax(-1)
        stop = p[list(stops)].sum(0, keepdim=True)
        return torch.cat([p[ids], stop, 1 - p[ids].sum(0, keepdim=True) - stop]).log()

    total = 0.0
    for ours, his in read:
        with torch.no_grad():
            log_p = classes(teacher(torch.tensor([his])).logits[0, -1], shared.teacher, shared.teacher_stops)
        log_q = classes(student(torch.tensor([ours])).logits[0, -1], shared.student, shared.student_stops)
        total = total + summands(divergence, log_q, log_p, alpha or 0.0).sum()
    (total / (len(rows) * LENGTH)).backward()
    assert relative_error(found, gradients(student)) < 1e-4


def test_other_divergences_need_the_teachers_distribution(tmp_path, made):
    with TeacherServer(made[2], name=str(tmp_path / "teacher")) as server:
        served = ServedTeacher(server.url, model=str(tmp_path / "teacher"))
        with pytest.raises(ValueError, match=r"whole distribution.*divergence='reverse_kl'"):
            build(tmp_path, made, served, divergence="forward_kl")


def test_an_object_with_the_students_ids_goes_beside_it(tmp_path, made, same_as_student):
    class Mine:
        def bind(self, student, accelerator, rows):
            self.judge = LocalTeacher(same_as_student, accelerator, len(STUDENT))

        def score(self, rollouts):
            return self.judge.score(rollouts)

    weights = {"texts": 0.5, "mine": 0.5}
    trainer = build(tmp_path, made, {"texts": made[2], "mine": Mine()}, teacher_weights=weights)
    beside = build(tmp_path, made, {"texts": made[2], "mine": same_as_student}, teacher_weights=weights)
    rows = [[4, 2, 1], [2, 3, 4]]
    first, second = (gradient_of(one, batch_of(one, rows)) for one in (trainer, beside))
    assert relative_error(first, second) < 1e-5
    assert len(TEACHER) == trainer.pool.members[0][0].module.config.vocab_size
