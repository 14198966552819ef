"""Every kind of teacher against the resident one: who judges which row, with which prompt, when, with what result."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import EOS, VOCAB, config, gradients, in_training, make_model, relative_error
from peft import LoraConfig, get_peft_model
from teacher_server import TeacherServer
from transformers import AutoModelForCausalLM

from trl_distill import AdapterOff, MovingAverage, OPDTrainer, ServedTeacher, TeacherAnswerError, TeacherUnavailable
from trl_distill.rollouts import MicroBatch
from trl_distill.teachers.pool import weights_of
from trl_distill.training.checkpoints import mark_complete


PASSED = ("train_dataset", "peft_config", "model", "environment_factory")  # beside the configuration


@pytest.fixture
def make(tmp_path, tokenizer, prompts, student, teacher):
    with torch.no_grad():  # stop early now and then, so that completions are ragged
        student.model.embed_tokens.weight[EOS] *= 1.5

    def build(**changes):
        given = {name: changes.pop(name) for name in PASSED if name in changes}
        teacher_model = changes.pop("teacher_model", "copy")
        return OPDTrainer(
            **{
                "model": copy.deepcopy(student),
                "teacher_model": copy.deepcopy(teacher)
                if isinstance(teacher_model, str) and teacher_model == "copy"
                else teacher_model,
                "args": config(tmp_path, **changes),
                "train_dataset": prompts,
                "processing_class": tokenizer,
                **given,
            }
        )

    return build


def trained(trainer) -> tuple[list[dict], torch.Tensor]:
    trainer.train()
    rows = [
        {k: row[k] for k in ("loss", "grad_norm", "distill/reverse_kl")}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    return rows, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def generated(trainer, rows) -> dict:
    """A generation batch as TRL hands it on, before it is shuffled."""
    in_training(trainer)
    return trainer._generate_and_score_completions(rows)


ESTIMATORS = [("full", 0.0), ("topk", 0.0), ("sampled", 0.0), ("full", 1.0)]


@pytest.mark.parametrize(("estimator", "discount"), ESTIMATORS)
def test_an_offloaded_teacher_trains_as_a_resident_one(make, estimator, discount):
    """Up to rounding: it judges rows of like length together, a resident one those of each micro-batch."""
    settings = {
        "kl_estimator": estimator,
        "kl_discount": discount,
        "kl_top_k": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
    }
    (resident, expected), (offloaded, found) = (
        trained(make(**settings)),
        trained(make(teacher_offload=True, **settings)),
    )
    for ours, theirs in zip(offloaded, resident, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_an_offloaded_teacher_visits_once_per_generation_batch_and_leaves_its_head(make, monkeypatch):
    """On the CPU both places are the same device, so a visitor's weights are made copies, which tells them apart."""
    trainer = make(teacher_offload=True, gradient_accumulation_steps=2, num_iterations=2, max_steps=4)
    teacher, visits, updates = trainer.teacher, [], []
    score, loss = teacher.score, trainer.rollout_loss
    monkeypatch.setattr(teacher, "score", lambda rollouts: (visits.append(len(rollouts)), score(rollouts))[1])

    def rollout_loss(model, inputs):
        updates.append([parameter.data_ptr() == home.data_ptr() for parameter, home in teacher._offloaded])
        return loss(model, inputs)

    def copied(home):
        copies.append(home.clone())
        return copies[-1]

    copies: list = []
    monkeypatch.setattr(teacher, "_on_accelerator", copied)
    monkeypatch.setattr(trainer, "rollout_loss", rollout_loss)
    trainer.train()
    assert len(copies) == 2 * len(teacher._offloaded)
    assert visits == [8, 8]  # 4 optimizer steps, two for each generation batch of 8 rows
    assert len(updates) == 8
    assert all(all(home) for home in updates)
    names = {id(parameter): name for name, parameter in teacher.model.named_parameters()}
    offloaded = {names[id(parameter)] for parameter, _ in teacher._offloaded}
    assert set(names.values()) - offloaded == {"model.embed_tokens.weight"}  # tied: it is the LM head
    assert all(not waiting for waiting in trainer.pool._waiting)  # nothing is kept after its last use


def test_iterations_ask_a_resident_teacher_once(make, monkeypatch):
    trainer = make(num_iterations=3, gradient_accumulation_steps=2, max_steps=3)
    asked = []
    score = trainer.teacher.score
    monkeypatch.setattr(trainer.teacher, "score", lambda rollouts: (asked.append(len(rollouts)), score(rollouts))[1])
    trainer.train()
    assert asked == [8]


def test_evaluation_inside_training_leaves_what_is_waiting(make, prompts, tmp_path, student, teacher, tokenizer):
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config(
            tmp_path,
            teacher_offload=True,
            num_iterations=2,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=4,
        ),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        processing_class=tokenizer,
    )
    trainer.train()
    assert sum("eval_distill/reverse_kl" in row for row in trainer.state.log_history) == 2


def test_scoring_in_parts_changes_nothing(make):
    whole, parts = trained(make())[0], trained(make(teacher_batch_size=3))[0]
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("offload", [False, True])
def test_loading_settings_reach_the_loader(make, saved, monkeypatch, offload):
    """Quantisation and the like are the loader's business; what is given arrives, and the dtype is the checkpoint's."""
    from trl_distill.teachers import spec as teachers

    seen = {}
    load = teachers.create_model_from_path

    def loader(path, **kwargs):
        seen.update(kwargs)
        return load(path, dtype=kwargs["dtype"], output_loading_info=kwargs["output_loading_info"])

    monkeypatch.setattr(teachers, "create_model_from_path", loader)
    given = {"quantization_config": {"load_in_4bit": True}, "attn_implementation": "eager"}
    path = str(saved / "teacher")
    make(teacher_model=path, teacher_model_init_kwargs=given, teacher_model_revision="main", teacher_offload=offload)
    expected = {"dtype": "auto", "revision": "main", "trust_remote_code": False, "output_loading_info": True, **given}
    assert seen == (expected | {"device_map": None} if offload else expected)


def test_a_device_map_places_the_teacher(make, saved):
    trainer = make(teacher_model=str(saved / "teacher"), teacher_model_init_kwargs={"device_map": {"": "cpu"}})
    assert {p.device for p in trainer.teacher.model.parameters()} == {torch.device("cpu")}
    for a, b in zip(trained(make(teacher_model=str(saved / "teacher")))[0], trained(trainer)[0], strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # how a file lies in memory shows in the last bits


@pytest.mark.parametrize("attribute", ["is_quantized", "hf_device_map"])
def test_parking_what_cannot_be_moved(make, teacher, attribute):
    setattr(teacher, attribute, {"": "cpu"} if attribute == "hf_device_map" else True)
    with pytest.raises(ValueError, match="not possible if it is quantised or has a `device_map`"):
        make(teacher_model=teacher, teacher_offload=True)


# -- the student itself as teacher -----------------------------------------------------------------------------------


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("estimator", ["full", "topk", "sampled"])
def test_adapter_off_equals_a_copy_of_the_base(make, student, estimator, discount):
    """With an adapter that starts away from zero, so that there is something to learn."""
    settings = {"kl_estimator": estimator, "kl_top_k": 4, "kl_discount": discount, "peft_config": lora()}
    expected = trained(make(teacher_model=copy.deepcopy(student), **settings))
    found = trained(make(teacher_model="adapter-off", **settings))
    for a, b in zip(expected[0], found[0], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    torch.testing.assert_close(expected[1], found[1], rtol=1e-4, atol=1e-6)


def test_adapter_off_needs_an_adapter_and_a_frozen_head(make):
    with pytest.raises(ValueError, match="the student has no adapter"):
        make(teacher_model="adapter-off")
    with pytest.raises(ValueError, match="LM head is trained too"):
        make(
            teacher_model="adapter-off",
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        )


@pytest.mark.parametrize("peft", [False, True])
def test_the_moving_average_is_one(make, prompts, peft):
    """After some steps the teacher's signal is that of a model made by hand from the averaged weights."""
    hints = prompts.add_column("teacher_prompt", [f"h {text}" for text in prompts["prompt"]])
    trainer = make(
        teacher_model=None,
        teacher_ema=0.8,
        train_dataset=hints,
        max_steps=3,
        **({"peft_config": lora()} if peft else {}),
    )
    average = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    follow = trainer.teacher.follow

    def by_hand():
        follow()
        for name, parameter in trainer.model.named_parameters():
            if name in average:
                average[name] = 0.8 * average[name] + 0.2 * parameter.detach()

    trainer.teacher.follow = by_hand
    trainer.train()
    own = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    batch = generated(trainer, [{"prompt": "a b"}] * 2)
    (score,) = trainer.pool.score(MicroBatch.from_inputs(batch), training=True)
    for name, parameter in trainer.model.named_parameters():  # the student has its own weights back
        assert torch.equal(parameter, own[name])
        parameter.data = average.get(name, parameter.data)
    trainer.model.eval()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -batch["completion_ids"].shape[1] - 1 : -1]
    found = score.signal.head.logits(score.signal.hidden)
    torch.testing.assert_close(found, logits[score.mask], rtol=1e-4, atol=1e-5)
    moved = max((own[name] - value).abs().max() for name, value in average.items())
    assert moved > 1e-3


def test_the_moving_average_is_saved_and_resumed(make, prompts, tmp_path):
    hints = prompts.add_column("teacher_prompt", ["h"] * len(prompts))
    settings = {
        "teacher_model": None,
        "teacher_ema": 0.8,
        "train_dataset": hints,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make(**settings, max_steps=4)
    whole.train()
    resumed = make(**settings, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, average in whole.teacher.averages.items():
        torch.testing.assert_close(resumed.teacher.averages[name], average, rtol=1e-5, atol=1e-7)
    (tmp_path / "checkpoint-2" / "teacher_ema.safetensors").unlink()
    mark_complete(tmp_path / "checkpoint-2")  # as of a run that had none
    with pytest.raises(ValueError, match="from a run without this `teacher_ema`"):
        make(**settings, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_two_moving_averages_have_files_of_their_own(make, prompts, tmp_path):
    rows = prompts.add_column("teacher", ["slow", "fast"] * (len(prompts) // 2))
    rows = rows.add_column("teacher_prompt", ["h"] * len(prompts))
    averages = {"slow": MovingAverage(0.9), "fast": MovingAverage(0.5)}
    trainer = make(teacher_model=averages, train_dataset=rows, save_strategy="steps", save_steps=2)
    trainer.train()
    for teacher in averages.values():
        kept = {name: average.clone() for name, average in teacher.averages.items()}
        teacher.load(str(tmp_path / "checkpoint-2"))
        assert all(torch.equal(teacher.averages[name], average) for name, average in kept.items())
    assert not all(map(torch.equal, averages["slow"].averages.values(), averages["fast"].averages.values()))


def test_a_prompt_for_the_teacher_beside_environments(make, prompts):
    class Nothing:
        def reset(self, **_):
            return None

    rows = prompts.add_column("teacher_prompt", ["h"] * len(prompts))
    with pytest.raises(ValueError, match="environments append observations to the prompts"):
        make(train_dataset=rows, environment_factory=Nothing)


def test_adapter_off_refuses_an_adapter_that_trains_the_base(make):
    with pytest.raises(ValueError, match="this teacher would change during training"):
        make(teacher_model="adapter-off", peft_config=LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"))


def test_what_the_user_froze_stays_frozen(make, student):
    """PEFT switches a whole adapter on again when it leaves `disable_adapter`."""
    model = get_peft_model(student, lora())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer = make(model=model, teacher_model="adapter-off")
    trainer.train()
    assert {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()} == before


def test_columns_that_would_be_dropped_or_missing_at_evaluation(make, pair, prompts, tmp_path, student, tokenizer):
    hints = prompts.add_column("teacher_prompt", ["h"] * len(prompts))
    with pytest.raises(ValueError, match="`remove_unused_columns=True` drops the columns"):
        make(train_dataset=hints, remove_unused_columns=True)
    with pytest.raises(ValueError, match="no `teacher` column"):
        OPDTrainer(
            model=student,
            teacher_model=pair,
            args=config(tmp_path),
            train_dataset=prompts.add_column("teacher", ["math"] * len(prompts)),
            eval_dataset=prompts,
            processing_class=tokenizer,
        )


def test_streaming_rows_may_bring_prompts_that_are_not_known_yet(make, prompts):
    rows = [{"prompt": text, "teacher_prompt": f"h {text}"} for text in prompts["prompt"]]
    streaming = IterableDataset.from_generator(lambda: iter(rows))
    assert streaming.column_names is None
    trainer = make(teacher_model=None, teacher_ema=0.9, train_dataset=streaming, max_completion_length=None)
    trainer.train()
    assert trainer.state.log_history[0]["distill/reverse_kl"] > 0


def test_a_decay_that_is_none():
    with pytest.raises(ValueError, match="it is the decay of a moving average"):
        MovingAverage(1.0)


# -- prompts of the teacher's own ------------------------------------------------------------------------------------


def test_teacher_prompts_of_other_lengths_keep_completions_aligned(make, teacher):
    """The signal is the teacher's hidden state at the same completion tokens after its own prompt."""
    trainer = make()
    rows = [
        {"prompt": "a b", "teacher_prompt": "c d e f g"},
        {"prompt": "a b c d", "teacher_prompt": "h"},
        {"prompt": "e", "teacher_prompt": None},
    ]
    batch = generated(trainer, rows)
    (score,) = trainer.pool.score(MicroBatch.from_inputs(batch), training=True)
    logits = score.signal.head.logits(score.signal.hidden).split(score.mask.sum(1).tolist())
    tokenizer = trainer.tokenizer
    for row, found, completion, mask in zip(rows, logits, batch["completion_ids"], score.mask, strict=True):
        prompt = tokenizer(row["teacher_prompt"] or row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *completion[mask].tolist()]])
        expected = teacher(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_teacher_prompts_may_be_messages(make, tokenizer, prompts):
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = template
    trainer = make()
    trainer._tokenizer = trainer.processing_class = with_template
    trainer.chat_template = None
    said = [{"role": "user", "content": "a b"}]
    rows = [{"prompt": said, "teacher_prompt": [{"role": "system", "content": "c d"}, *said]}, {"prompt": said}]
    batch = generated(trainer, rows)
    asked = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"], strict=True)
    ]
    assert asked == [tokenizer("c d a b a")["input_ids"], tokenizer("a b a")["input_ids"]]


def test_a_teacher_prompt_that_is_none(make, prompts):
    with pytest.raises(ValueError, match="Row 3 of the training dataset has the teacher prompt ''"):
        make(train_dataset=prompts.add_column("teacher_prompt", ["a", None, "b", "", *["c"] * 28]))


# -- several teachers ------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    return {"math": make_model(seed=3, hidden_size=24), "code": make_model(seed=4)}


def loss_and_gradient(trainer, rows):
    torch.manual_seed(0)
    batch = generated(trainer, rows)
    trainer.model.zero_grad()
    loss = trainer.rollout_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


@pytest.mark.parametrize(("estimator", "discount"), ESTIMATORS)
def test_rows_go_to_the_teacher_that_they_name_and_mixtures_add_up(make, pair, prompts, estimator, discount):
    """By hand: the loss of each row under each teacher alone, weighted."""
    settings = {"kl_estimator": estimator, "kl_discount": discount, "kl_top_k": 4, "loss_type": "luspo"}
    named = ["math", "code", {"math": 0.7, "code": 0.3}, {"code": 2.0, "math": None}, {"math": 1.25, "code": -0.25}]
    texts = ["a b", "c", "d e f", "g h", "a"]
    rows = [{"prompt": text, "teacher": name} for text, name in zip(texts, named, strict=True)]
    column = prompts.add_column("teacher", ["math"] * len(prompts))
    trainer = make(teacher_model=copy.deepcopy(pair), train_dataset=column, **settings)
    loss, gradient = loss_and_gradient(trainer, rows)
    expected_loss, expected = 0.0, torch.zeros_like(gradient)
    for i, name in enumerate(("math", "code")):
        alone = make(teacher_model=copy.deepcopy(pair[name]), **settings)
        for row in rows:
            weight = weights_of(row["teacher"], ["math", "code"], "")[i]
            if weight != 0:
                found, direction = loss_and_gradient(alone, [{"prompt": row["prompt"]}])
                expected_loss += weight * found / len(rows)
                expected += weight * direction / len(rows)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("offload", [False, True])
def test_several_teachers_train_and_log_by_name(make, pair, prompts, offload):
    column = prompts.add_column("teacher", (["math", "code", "math", "math"] * 8))
    trainer = make(teacher_model=pair, train_dataset=column, teacher_offload=offload, max_steps=3)
    trainer.train()
    for row in trainer.state.log_history[:-1]:
        assert row["distill/reverse_kl/math"] > 0
    assert any(row["distill/reverse_kl/code"] > 0 for row in trainer.state.log_history[:-1])


def test_offloaded_and_resident_teachers_route_alike(make, pair, prompts):
    column = prompts.add_column("teacher", (["math", "code", "math", "math"] * 8))
    runs = [
        trained(
            make(
                teacher_model=copy.deepcopy(pair),
                train_dataset=column,
                teacher_offload=offload,
                gradient_accumulation_steps=2,
            )
        )
        for offload in (False, True)
    ]
    for a, b in zip(*(run[0] for run in runs), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_checkpoint_with_two_names_is_loaded_once(make, saved, prompts):
    path = str(saved / "teacher")
    column = prompts.add_column("teacher", ["one", "two"] * 16)
    trainer = make(teacher_model={"one": path, "two": path}, train_dataset=column)
    assert len(trainer.pool.members) == 1
    trainer.train()
    assert all(f"distill/reverse_kl/{name}" in trainer.state.log_history[0] for name in ("one", "two"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("physics", "names the teacher 'physics', which does not exist. Name one of 'math', 'code'"),
        (None, "Name one of 'math', 'code'"),
        ({"math": -1.0}, "must add up to 1"),
        ({"math": 1.5, "code": -0.4}, "must add up to 1"),
        ({"math": float("nan")}, "must be finite numbers"),
        ({"math": 0.0}, "not all of them 0"),
    ],
    ids=str,
)
def test_a_row_without_a_known_teacher(value, message):
    with pytest.raises(ValueError, match=message):
        weights_of(value, ["math", "code"], "Row 1")


def test_unknown_teachers_are_found_before_training(make, pair, prompts):
    with pytest.raises(ValueError, match="no `teacher` column"):
        make(teacher_model=pair)
    with pytest.raises(ValueError, match=r"Row 5 of the training dataset names the teacher 'art'"):
        make(teacher_model=pair, train_dataset=prompts.add_column("teacher", ["math"] * 5 + ["art"] * 27))
    with pytest.raises(ValueError, match="empty dictionary"):
        make(teacher_model={})


def test_a_mixture_of_two_equal_teachers_is_one(make, prompts, teacher):
    """A weighted sum of KLs: 0.7 and 0.3 of the same teacher are the teacher."""
    twins = {"a": copy.deepcopy(teacher), "b": copy.deepcopy(teacher)}
    column = prompts.add_column("teacher", [{"a": 0.7, "b": 0.3}] * len(prompts))
    mixed, alone = trained(make(teacher_model=twins, train_dataset=column))[0], trained(make())[0]
    for a, b in zip(mixed, alone, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_names_of_one_teacher_whose_weights_cancel_take_no_part(make, saved, prompts, student):
    """Weights 1 and -1 of one checkpoint leave the other alone, and no metric counts the rows for it."""
    same, other = str(saved / "teacher"), copy.deepcopy(student)
    weights = {"up": 1.0, "down": -1.0, "other": 1.0}
    trainer = make(teacher_model={"up": same, "down": same, "other": other}, teacher_weights=weights)
    batch = generated(trainer, [{"prompt": "a b"}, {"prompt": "c"}])
    (score,) = trainer.pool.score(MicroBatch.from_inputs(batch), training=True)
    assert list(score.rows) == ["other"]
    trained(trainer)
    assert "distill/reverse_kl/up" not in trainer.state.log_history[0]


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "parked"])
@pytest.mark.parametrize("kind", ["adapter off", "its folder"])
def test_away_from_the_students_own_start(make, saved, kind, offload):
    """At first the reference is the student: it pulls at nothing. Then the student is driven away from it."""
    path, adapter = str(saved / "student"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "mlp.down_proj"])
    student = {"model": path} | ({"peft_config": adapter} if kind == "adapter off" else {})
    settings = {"max_steps": 4, "learning_rate": 3e-2, "teacher_offload": offload, **student}
    teacher, ref = str(saved / "teacher"), "adapter-off" if kind == "adapter off" else path
    weights = {"teacher": 1.25, "ref": -0.25}
    beyond = make(teacher_model={"teacher": teacher, "ref": ref}, teacher_weights=weights, **settings)
    alone = make(teacher_model=teacher, **settings)
    (found, _), (expected, _) = trained(beyond), trained(alone)
    log = beyond.state.log_history
    assert log[0]["distill/reverse_kl/ref"] == pytest.approx(0, abs=1e-5)
    assert log[3]["distill/reverse_kl/ref"] > 1e-3
    assert found[0]["loss"] == pytest.approx(1.25 * expected[0]["loss"], rel=1e-4)
    assert found[0]["grad_norm"] == pytest.approx(1.25 * expected[0]["grad_norm"], rel=1e-3)
    by_name = [1.25 * log[3]["distill/reverse_kl/teacher"], -0.25 * log[3]["distill/reverse_kl/ref"]]
    assert found[3]["distill/reverse_kl"] == pytest.approx(sum(by_name), rel=1e-4)


def test_a_reference_is_not_compared_with_the_student(make, saved, student):
    """Agreement with the teacher is not mixed with that of a model that the student is to leave."""
    ref, teacher = str(saved / "student"), str(saved / "teacher")
    rows = []
    for model, weights in (
        ({"teacher": teacher, "ref": ref}, {"teacher": 1.25, "ref": -0.25}),
        (teacher, None),
    ):
        trainer = make(model=ref, teacher_model=model, teacher_weights=weights, max_steps=1)
        trainer.train()
        rows.append(trainer.state.log_history[0])
    for key in ("distill/top1_agreement", "distill/forward_kl", "distill/compared_tokens"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-5), key
    assert rows[0]["distill/top1_agreement"] < 0.9  # 1 with the reference, which is the student


def test_weights_for_all_rows(make, pair, prompts, teacher):
    with pytest.raises(ValueError, match=r"there is only one teacher. Set `beta`"):
        make(teacher_weights={"teacher": 2.0})
    with pytest.raises(ValueError, match=r"`teacher_weights` names the teacher 'art', which does not exist"):
        make(teacher_model=pair, teacher_weights={"art": 1.0})
    (weighted, _), (written, _) = (
        trained(make(teacher_model=copy.deepcopy(pair), **changes))
        for changes in (
            {"teacher_weights": {"math": 1.5, "code": -0.5}},
            {"train_dataset": prompts.add_column("teacher", [{"math": 1.5, "code": -0.5}] * len(prompts))},
        )
    )
    for a, b in zip(weighted, written, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


# -- served teachers -------------------------------------------------------------------------------------------------


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
