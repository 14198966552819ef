"""Bad input: a clear error before any training step, that says what to change."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import VOCAB, WORDS, config, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Florence2Config, LlamaForSequenceClassification
from trl import GRPOConfig

from trl_distill import HiddenStates, NonFiniteLossError, OPDTrainer
from trl_distill.checks import settings as setting_checks
from trl_distill.checks.models import check_architecture
from trl_distill.models.hidden_states import add_teacher_forward
from trl_distill.training import setup


@pytest.fixture
def make(tmp_path, tokenizer, prompts, student, teacher):
    """Builds a trainer from good input in which a test replaces one thing."""

    def build(**changes):
        settings = {
            "model": student,
            "teacher_model": teacher,
            "train_dataset": prompts,
            "processing_class": tokenizer,
            "args": config(tmp_path),
        }
        return OPDTrainer(**{**settings, **changes})

    return build


def test_good_input_passes(make):
    assert make().teacher is not None


@pytest.mark.parametrize("peft", [False, True])
def test_no_teacher(make, student, peft):
    from peft import LoraConfig, get_peft_model

    changes = {"model": get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"]))} if peft else {}
    with pytest.raises(ValueError, match=r"There is no teacher, but `beta` is 1\.0"):
        make(teacher_model=None, **changes)


def test_neither_teacher_nor_reward(make, tmp_path):
    with pytest.raises(ValueError, match="No reward source provided"):
        make(args=config(tmp_path, beta=0.0, num_generations=2))


def test_two_teachers(make, tmp_path):
    with pytest.raises(ValueError, match="Two teachers"):
        make(args=config(tmp_path, teacher_model_name_or_path="other"))


def test_teacher_is_the_student(make, student):
    with pytest.raises(ValueError, match="is the student itself"):
        make(teacher_model=student)


def test_teacher_is_the_base_of_the_students_adapter(make, student):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="the base model under its adapter"):
        make(model=get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"])), teacher_model=student)


def test_teacher_is_nothing_of_the_kind(make):
    with pytest.raises(TypeError, match=r"`teacher_model` is 7, which cannot score rollouts\. Give a hub name"):
        make(teacher_model=7)


def test_teacher_path_that_does_not_exist(make, tmp_path):
    with pytest.raises(ValueError, match=r"folder .*nowhere' does not exist"):
        make(teacher_model=str(tmp_path / "nowhere"))


def test_init_kwargs_for_a_teacher_that_is_loaded(make, tmp_path):
    with pytest.raises(ValueError, match="loaded already"):
        make(args=config(tmp_path, teacher_model_init_kwargs={"dtype": "float32"}))


def test_an_encoder_and_decoder_that_sees():
    with pytest.raises(ValueError, match=r"The teacher \(florence2\) is an encoder and a decoder"):
        check_architecture(Florence2Config(), "teacher")


@pytest.fixture
def other_tokenizer():
    return make_tokenizer([*WORDS[:5], "zz", *WORDS[6:]])


def test_other_tokenizer(make, saved, other_tokenizer, caplog):
    other_tokenizer.save_pretrained(saved / "teacher")
    with pytest.raises(ValueError, match=r"differ in 1 of 29 ids.*5: 'd' against 'zz'"):
        make(teacher_model=str(saved / "teacher"))
    make(
        teacher_model=str(saved / "teacher"), args=config(saved, assume_same_tokenizer=True)
    )  # for those who know better
    assert "Continuing, as `assume_same_tokenizer=True` is set" in caplog.text


def test_tokenizer_with_more_ids_than_the_teacher_has(make, prompts):
    with pytest.raises(ValueError, match="produces ids up to 31, but the teacher's vocabulary ends at 28"):
        make(model=make_model(seed=1, vocab_size=32), processing_class=make_tokenizer([*WORDS, "x1", "x2", "x3"]))


def test_padded_vocabularies_of_one_tokenizer_pass(make, saved):
    make_model(seed=2, vocab_size=VOCAB + 9).save_pretrained(saved / "teacher")
    make(teacher_model=str(saved / "teacher"))


def test_teacher_without_a_tokenizer_is_said(make, caplog):
    make()
    assert "The teacher has no tokenizer with it" in caplog.text


def test_adapter_on_the_lm_head(make):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make(model=make_model("untied"), peft_config=LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"question": ["a"] * 8}), r"no 'prompt' column; it has \['question'\]"),
        (Dataset.from_dict({"prompt": []}), "training dataset is empty"),
        (Dataset.from_dict({"prompt": ["a"] * 3}), "has 3 prompts, but one generation batch takes 4"),
    ],
)
def test_dataset(make, dataset, message):
    with pytest.raises(ValueError, match=message):
        make(train_dataset=dataset)


def test_streaming_dataset_without_prompts(make, tmp_path):
    stream = Dataset.from_dict({"question": ["a"] * 8}).to_iterable_dataset()
    with pytest.raises(ValueError, match="no 'prompt' column"):
        make(train_dataset=stream)


def test_smaller_teacher_vocabulary_with_vllm(make, tmp_path, monkeypatch):
    trainer = make()
    trainer.use_vllm = True
    with pytest.raises(ValueError, match="vLLM rollouts cannot be kept inside it"):
        setup._stay_inside_vocabulary(trainer, VOCAB - 1)


def test_checkpoint_boundary():
    assert setting_checks.checkpoint_boundary(save_steps=4, accumulation=2, generate_every=8).level == "ok"
    assert setting_checks.checkpoint_boundary(save_steps=0.5, accumulation=1, generate_every=8).level == "ok"
    found = setting_checks.checkpoint_boundary(save_steps=5, accumulation=2, generate_every=8)
    assert found.level == "warning"
    assert "lasts 4 optimizer steps" in found.found


def test_the_student_is_not_touched_by_a_refusal(make, student):
    config = copy.deepcopy(student.config.to_dict())
    with pytest.raises(ValueError, match="no teacher"):
        make(teacher_model=None)
    assert "forward" not in vars(student)
    assert student.config.to_dict() == config
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("what", ["classifier", "backbone", "class"])
def test_a_teacher_that_is_no_causal_language_model(make, what):
    causal = make_model("untied", seed=2)
    if what == "class":
        with pytest.raises(TypeError, match="Give a hub name"):
            make(teacher_model=type("Judge", (), {"score": lambda self, rollouts: None}))
        return
    other = LlamaForSequenceClassification(causal.config) if what == "classifier" else causal.model
    with pytest.raises(ValueError, match="has no LM head"):
        make(teacher_model=other)


def test_adapter_on_the_teachers_lm_head(make):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_model("untied", seed=2), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="adapter on the LM head is not supported"):
        make(teacher_model=adapted)


def test_adapter_folder_as_teacher(make, saved, teacher):
    from peft import LoraConfig, get_peft_model

    get_peft_model(teacher, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(saved / "adapter")
    with pytest.raises(ValueError, match="is an adapter, not a whole model"):
        make(teacher_model=str(saved / "adapter"))


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_head_that_does_more_than_we_know(make, whose):
    model = make_model(seed=3)
    model.lm_head.register_forward_hook(lambda _m, _a, logits: 0.5 * logits)
    with pytest.raises(ValueError, match=f"The {whose}'s logits do not follow"):
        make(**{{"student": "model", "teacher": "teacher_model"}[whose]: model})


def test_several_splits_as_training_dataset(make, prompts):
    with pytest.raises(ValueError, match=r"has several splits\. Pass one of them: `dataset\['train'\]`"):
        make(train_dataset=DatasetDict(train=prompts))
    with pytest.raises(TypeError, match="must be a `Dataset`"):  # TRL's own
        make(train_dataset=[{"prompt": "a"}])


@pytest.mark.parametrize("several", [False, True])
def test_evaluation_dataset_without_prompts(make, several):
    dataset = Dataset.from_dict({"question": ["a"] * 8})
    with pytest.raises(ValueError, match="evaluation dataset has no 'prompt' column"):
        make(eval_dataset={"one": dataset} if several else dataset)


def test_a_teacher_beside_a_grpo_config_without_beta(make, tmp_path, caplog):
    grpo = GRPOConfig(output_dir=str(tmp_path), num_generations=2, bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="under which it would not be used"):
        make(args=grpo, reward_funcs=lambda completions, **_: [0.0] * len(completions))
    make(
        args=config(tmp_path, beta=0.0, num_generations=2),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )
    assert "the teacher is not loaded" in caplog.text


@pytest.mark.parametrize("bad", [None, "", 7, []])
def test_a_row_without_a_prompt_is_named(make, bad):
    good = {"prompt": [{"role": "user", "content": "a"}]} if isinstance(bad, list) else {"prompt": "a b"}
    rows = [{"prompt": 1} if bad == 7 else good] * 9 + [{"prompt": bad}]
    with pytest.raises(ValueError, match=f"Row {0 if bad == 7 else 9} of the training dataset has the prompt"):
        make(train_dataset=Dataset.from_list(rows))


def test_teacher_with_the_students_weights(make, saved, tmp_path, prompts, caplog):
    same = {"model": str(saved / "student"), "teacher_model": str(saved / "student")}
    with pytest.raises(ValueError, match=r"give the same probabilities.*there is nothing to learn"):
        make(**same)
    make(**same, args=config(tmp_path, assume_different_teacher=True))
    assert "Continuing: `assume_different_teacher=True`" in caplog.text
    make(**same, train_dataset=prompts.add_column("teacher_prompt", ["a hint"] * len(prompts)))
    assert "Continuing: it has its own prompts" in caplog.text
    make(
        **same, args=config(tmp_path, num_generations=2), reward_funcs=lambda completions, **_: [0.0] * len(completions)
    )
    assert "Continuing: there is a reward" in caplog.text


def test_a_teacher_that_scores_something_else(make):
    class Judge:
        def score(self, rollouts):
            return {"hidden": None}

    with pytest.raises(TypeError, match=r"returned a dict; it must return `trl_distill\.HiddenStates`, or say"):
        make(teacher_model=Judge())


def test_reward_weights_without_rewards(make, tmp_path):
    with pytest.raises(ValueError, match="but no `reward_funcs`"):
        make(args=config(tmp_path, reward_weights=[1.0]))


def test_settings_without_effect_are_said(make, tmp_path, caplog):
    make(args=config(tmp_path, top_entropy_quantile=0.5))
    assert "`top_entropy_quantile` belongs to the policy loss" in caplog.text


@pytest.fixture
def broken(saved, request):
    """A saved teacher of which something is wrong."""
    weights = saved / "teacher" / "model.safetensors"
    if request.param == "a layer short":
        state = load_file(weights)
        save_file({n: t for n, t in state.items() if ".layers.1." not in n}, weights, metadata={"format": "pt"})
    elif request.param == "cut off":
        weights.write_bytes(weights.read_bytes()[:3000])
    elif request.param == "a pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif request.param == "no weights":
        weights.unlink()
    elif request.param == "no config":
        (saved / "teacher" / "config.json").unlink()
    else:
        (saved / "teacher" / "config.json").write_text("{")
    return saved


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("a layer short", r"The checkpoint of the teacher '.*' lacks \d+ of its weights"),
        ("cut off", "The weights of the teacher '.*' could not be loaded"),
        ("a pointer", "The weights of the teacher '.*' could not be loaded"),
        ("no weights", "The weights of the teacher '.*' could not be loaded"),
        ("no config", "has no `config.json`"),
        ("a torn config", "The teacher's `config.json` in '.*' cannot be read"),
    ],
    indirect=["broken"],
)
def test_a_teacher_that_is_not_whole(broken, tmp_path, prompts, message):
    """What is missing would be random, and a run against it would look like any other."""
    with pytest.raises(ValueError, match=message):
        OPDTrainer(
            model=str(broken / "student"),
            teacher_model=str(broken / "teacher"),
            args=config(tmp_path / "out"),
            train_dataset=prompts,
        )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, answer, **_: [0.0], "missing a required argument: 'answer'"),
        (lambda completions: [0.0], "got an unexpected keyword argument"),
    ],
)
def test_rewards_that_cannot_be_called(make, tmp_path, function, message):
    """Before anything is generated; the message lists what they are given."""
    with pytest.raises(ValueError, match=f"cannot be called: {message}.*trainer_state.*`\\*\\*kwargs`"):
        make(reward_funcs=[function], args=config(tmp_path, num_generations=2))


def test_an_infinite_reward_stops_the_run(make, tmp_path):
    trainer = make(
        reward_funcs=[lambda completions, **_: [float("inf")] * len(completions)],
        args=config(tmp_path, num_generations=2),
    )
    with pytest.raises(NonFiniteLossError, match="returned an infinite reward after step 0"):
        trainer.train()


def test_a_wrong_folder_is_said_at_once(tmp_path, prompts, saved, monkeypatch):
    """What cannot be a name on the hub is not asked for there."""
    monkeypatch.chdir(saved)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"folder '\./teachr' does not exist"):
        OPDTrainer(
            model=make_model(seed=1),
            teacher_model="./teachr",
            args=config(tmp_path),
            train_dataset=prompts,
        )


@pytest.mark.parametrize("gives", [False, True], ids=["says nothing of its signal", "says what it gives"])
def test_a_teacher_of_ones_own_is_compared_with_the_student(make, student, gives):
    """Its own weights are the student's: that is found out, whether or not it says which signal it gives."""

    class Copy:
        def __init__(self):
            self.model = copy.deepcopy(student).eval()
            add_teacher_forward(self.model)

        def score(self, rollouts):
            with torch.no_grad():
                ids, mask = rollouts.input_ids, rollouts.attention_mask
                return self.model(input_ids=ids, attention_mask=mask, rollouts=rollouts)

    if gives:
        Copy.gives = HiddenStates
    with pytest.raises(ValueError, match="nothing to learn"):
        make(model=student, teacher_model=Copy())
