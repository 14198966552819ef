"""What `_trl.py` and `grpo_hooks.py` take for granted about TRL, one test per name: look here after an upgrade."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers import VOCAB, batch, config, in_training, make_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

import trl_distill
from trl_distill import OPDTrainer, _trl
from trl_distill._trl import has_triton


LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


@pytest.fixture
def grpo(tmp_path, tokenizer, prompts):
    """A plain GRPOTrainer behind our seams, ready to compute a loss; keyword arguments change its settings."""

    def build(**changes):
        return in_training(
            OPDTrainer(
                model=make_model(seed=1),
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                args=config(tmp_path, **{"beta": 0.0, "num_generations": 2, **changes}),
                train_dataset=prompts,
                processing_class=tokenizer,
            )
        )

    return build


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_compute_loss", ["self", "model", "inputs"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_get_train_sampler", ["self", "dataset"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
        (
            "_generate_single_turn",
            ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
        ("_tokenize_prompts", ["self", "prompts"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("_get_output_dir", ["self", "trial"]),
        ("log", ["self", "logs", "start_time"]),
    ],
)
def test_overridden_methods_keep_their_signature(name, parameters):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters


def test_our_constructor_takes_every_argument_of_trls():
    theirs = list(inspect.signature(GRPOTrainer.__init__).parameters)
    ours = list(inspect.signature(OPDTrainer.__init__).parameters)
    assert ours == [*theirs, "teacher_model"]


def test_attributes_exist(grpo):
    trainer = grpo()
    assert trainer._tokenizer is trainer.tokenizer
    assert set(trainer._metrics) == {"train", "eval"}
    assert "rewards" in trainer._logs
    assert trainer._logs["advantages"].maxlen == trainer.args.generation_batch_size
    assert trainer.environment_factories is None
    assert not trainer.has_environments
    assert trainer._entropy_bonus_enabled is False
    assert trainer.aux_loss_enabled is False
    assert not trainer.tools  # what prompts are rendered with; replaced by a row's own while it is rendered
    assert trainer.generation_config.suppress_tokens is None
    assert trainer.generation_kwargs["max_new_tokens"] == trainer.max_completion_length
    assert trainer.loss_type == "dapo"
    assert grpo(entropy_coef=0.1).has_side_terms
    assert not trainer.has_side_terms


def test_a_generation_batch_waits_in_micro_batches_that_are_taken_by_the_step(grpo):
    """What `by_length` puts into another order, and how the first one is found."""
    trainer = grpo(gradient_accumulation_steps=2, max_steps=2)
    taken, prepare = [], GRPOTrainer._prepare_inputs

    def watched(batch):
        inputs = prepare(trainer, batch)
        taken.append(inputs is trainer._buffered_inputs[trainer._step % trainer.args.steps_per_generation])
        return inputs

    trainer._prepare_inputs = watched
    assert (trainer._step, trainer.between_generations) == (0, True)
    trainer.train()
    assert taken == [True] * 4
    assert (trainer._step, trainer.between_generations) == (4, True)
    assert [len(batch["prompt_ids"]) for batch in trainer._buffered_inputs] == [4, 4]


def test_transformers_deletes_older_checkpoints_as_we_call_it(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    best = str(tmp_path / "checkpoint-1")
    rotate_checkpoints(str(tmp_path), save_total_limit=2, best_model_checkpoint=best, use_mtime=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_the_completions_table_is_made_of_columns_that_can_be_emptied(grpo):
    trainer = grpo(log_completions=True, max_steps=1)
    trainer.train()
    assert len(trainer._logs["prompt"]) == len(trainer._logs["completion"]) == 4
    trainer.forget_completions()
    columns = [trainer._logs[name] for name in ("prompt", "completion", "advantages")]
    assert not any(map(len, [*columns, *trainer._logs["rewards"].values()]))


def test_on_a_cpu_there_is_no_triton():
    assert has_triton(torch.device("cpu")) is False


def test_mode_follows_the_model(grpo):
    trainer = grpo()
    assert trainer.mode == "train"
    trainer.model.eval()
    assert trainer.mode == "eval"


def test_records_are_logged_as_means_and_forgotten_on_demand(grpo):
    trainer = grpo()
    for name, value in (("distill/x", 1.0), ("distill/x", 3.0), ("reward", 7.0), ("rewards/f/mean", 7.0)):
        trainer.record(name, value)
    trainer.forget("reward")
    logs = {}
    trainer.log(logs)
    assert logs["distill/x"] == 2.0
    assert not [key for key in logs if key.startswith("reward")]


def test_trl_still_demands_two_generations_and_runs_its_other_checks(tmp_path):
    settings = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(num_generations=1, **settings)
    for asked in (None, 1):
        args = config(tmp_path, num_generations=asked)
        assert args.num_generations is asked
        assert args.generation_batch_size == 4  # the rest of TRL's __post_init__ ran
    with pytest.raises(ValueError, match=r"clip_min .* must be less than"):  # behind the check that is passed over
        config(tmp_path, vllm_importance_sampling_clip_min=4.0)


def test_fields_given_as_json_are_listed_under_the_name_that_we_extend(tmp_path):
    assert "model_init_kwargs" in _trl.DICT_FIELDS
    args = config(tmp_path, model_init_kwargs='{"a": 1}', teacher_model_init_kwargs='{"b": 2}')
    assert (args.model_init_kwargs, args.teacher_model_init_kwargs) == ({"a": 1}, {"b": 2})


def test_no_reference_is_made_while_beta_is_zero(tmp_path, tokenizer, prompts, monkeypatch):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *a, **k: pytest.fail("loaded"))
    student = get_peft_model(make_model(seed=1), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = OPDTrainer(
        model=student,
        teacher_model=make_model(seed=2),
        args=config(tmp_path),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    assert list(trainer.model.peft_config) == ["default"]


def test_a_reward_source_is_demanded(tmp_path, tokenizer, prompts):
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="No reward source"):
        GRPOTrainer(model=make_model(), args=args, train_dataset=prompts, processing_class=tokenizer)


def test_what_reward_functions_are_called_with(tmp_path, tokenizer, prompts, student):
    seen = []

    def reward(**given):
        seen.append(set(given))
        return [0.0] * len(given["completions"])

    args = config(tmp_path, num_generations=2, beta=0.0, max_steps=1)
    GRPOTrainer(student, reward, args=args.resolved(True), train_dataset=prompts, processing_class=tokenizer).train()
    assert seen == [set(_trl.REWARD_ARGUMENTS)]


def test_log_probabilities_of_old_rollouts_may_be_left_out(grpo):
    """`skip_old_log_probs` returns `None` where TRL asks for them, and switches vLLM's ratio off by a public name."""
    seen, source = [], inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert source.count("self.use_vllm and self.vllm_importance_sampling_correction") == 4
    for skips in (False, True):
        trainer = grpo(steps_per_generation=2, gradient_accumulation_steps=1, max_steps=2)
        assert trainer.vllm_importance_sampling_correction is True
        if skips:
            trainer.skip_old_log_probs()
            assert trainer.vllm_importance_sampling_correction is False
        trainer.loss_computed = lambda loss, inputs: seen.append("old_per_token_logps" in inputs)
        trainer.train()
    assert seen == [True, True, False, False]


def test_the_policy_loss_only_calls_its_model_once(grpo):
    trainer, calls = grpo(), []

    def only_callable(**inputs):
        calls.append(set(inputs))
        return trainer.model(**inputs)

    trainer.policy_loss(only_callable, batch())
    assert calls == [{"input_ids", "attention_mask", "labels", "fused_lm_head"}]


def test_fused_forward_returns_what_we_extend(grpo):
    trainer, inputs = grpo(), batch()
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    output = trainer.model(input_ids=input_ids, labels=input_ids, fused_lm_head=True)
    assert isinstance(output, _trl.FusedCausalLMOutput)
    assert output.log_probs.shape == output.entropy.shape == (3, 9)
    assert "rollouts" not in inspect.signature(trainer.model.forward).parameters  # `generate` checks against it


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("training", [True, False])
def test_reduction_is_that_of_the_policy_loss(grpo, monkeypatch, loss_type, training):
    """
    With advantages of shape (B, C) and log-probabilities that are known, TRL's per-token loss is known too, and only
    its reduction is left to compare.
    """
    steps_per_generation, accumulation = 4, 2
    trainer = grpo(
        loss_type=loss_type,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=steps_per_generation,
        max_completion_length=11,
        epsilon_high=5.0,  # above 1, so that cispo does not clip
    )
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.model.train(training)
    inputs = batch()
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][1, 2] = 0
    inputs["num_items_in_batch"] = torch.tensor(37)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    advantages = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) + 0.5  # positive, per token
    inputs["advantages"] = advantages
    log_probs = -torch.ones(mask.shape)
    monkeypatch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *a, **k: (log_probs, torch.zeros(mask.shape), None),
    )
    per_token = {  # on-policy: the ratio is 1
        "sapo": -advantages * 2 / trainer.args.sapo_temperature_pos,  # 4/τ · sigmoid(0)
        "cispo": -advantages * log_probs,
        "vespo": -advantages * log_probs,  # φ(1) = 1
    }.get(loss_type, -advantages)
    expected = trainer.policy_loss(trainer.model, inputs)
    torch.testing.assert_close(trainer.reduce_per_token(per_token, mask, inputs), expected)
    assert expected.abs() > 1e-3


def test_every_loss_type_of_trl_is_known(grpo):
    trainer = grpo()
    documented = next(f for f in GRPOConfig.__dataclass_fields__.values() if f.name == "loss_type").metadata["help"]
    assert all(f"'{name}'" in documented for name in LOSS_TYPES)
    trainer.loss_type = "something new"
    with pytest.raises(ValueError, match="not known to this version"):
        trainer.reduce_per_token(torch.zeros(1, 1), torch.ones(1, 1), {})


def test_sampler_repeats_trls_order_and_can_start_at_a_later_epoch(grpo):
    def orders(trainer, epochs):
        sampler = trainer._get_train_sampler()
        return [list(sampler) for _ in range(epochs)]

    trainer = grpo()
    theirs = GRPOTrainer._get_train_sampler(trainer)
    expected = [list(theirs) for _ in range(3)]
    assert orders(trainer, 3) == expected
    assert expected[0] != expected[1]
    trainer.state.epoch = 2.0
    assert orders(trainer, 1) == expected[2:]
    unshuffled = grpo(shuffle_dataset=False)
    unshuffled.state.epoch = 2.0
    assert isinstance(unshuffled._get_train_sampler(), RepeatSampler)
    assert orders(unshuffled, 1)[0] == list(GRPOTrainer._get_train_sampler(unshuffled))
    assert not isinstance(unshuffled._get_train_sampler(), SequentialSampler)


def test_kernel_loops_over_the_students_vocabulary():
    """A larger teacher is cut by the kernel; what is right about the numbers is in `test_heads.py`."""
    hidden = torch.randn(5, 8)
    student, teacher = torch.randn(VOCAB, 8), torch.randn(VOCAB + 4, 8)
    full = _trl.ChunkedDivergenceFunction.apply(hidden, student, None, hidden, teacher, None, 1.0)[0]
    cut = _trl.ChunkedDivergenceFunction.apply(hidden, student, None, hidden, teacher[:VOCAB], None, 1.0)[0]
    torch.testing.assert_close(full, cut)


def test_log_prob_kernel_takes_what_we_pass():
    hidden, weight, ids = torch.randn(5, 8), torch.randn(VOCAB, 8), torch.arange(5)
    log_probs, *rest = _trl.ChunkedLogProbFunction.apply(hidden, weight, None, ids, 2.0, 16, 3.0, 0.5, ())
    logits = 3.0 * torch.tanh(0.5 * hidden @ weight.T / 3.0) / 2.0
    torch.testing.assert_close(log_probs, logits.log_softmax(-1)[torch.arange(5), ids])
    assert rest == [None] * 4


def test_gathering_a_head_does_nothing_without_zero3():
    weight = torch.randn(3, 2)
    with _trl.gathered_head(weight, None):
        assert weight.shape == (3, 2)


def test_create_model_from_path_takes_auto_dtype(saved):
    AutoModelForCausalLM.from_pretrained(saved / "teacher").to(torch.bfloat16).save_pretrained(saved / "teacher")
    model = _trl.create_model_from_path(str(saved / "teacher"), dtype="auto")
    assert model.dtype == torch.bfloat16
    assert _trl.get_config_model_id(model.config) == str(saved / "teacher")


def test_preparation_of_a_frozen_model_is_importable():
    assert list(inspect.signature(_trl.prepare_deepspeed).parameters) == ["model", "accelerator"]
    assert list(inspect.signature(_trl.prepare_fsdp).parameters) == ["model", "accelerator"]


def test_what_is_added_to_a_generation_batch_is_shuffled_and_split_with_it(grpo, prompts):
    """A row keeps its place beside its own completion, through both iterations."""
    trainer, seen = grpo(num_iterations=2, gradient_accumulation_steps=2, max_steps=2, top_k=0), []

    def on_rollouts(rows, batch):
        assert len(rows) == len(batch["prompt_ids"]) == 8
        batch["first_token"] = batch["completion_ids"][:, 0].clone()

    def rollout_loss(model, inputs):
        assert torch.equal(inputs["first_token"], inputs["completion_ids"][:, 0])
        seen.append(inputs["first_token"].tolist())
        return trainer.policy_loss(model, inputs)

    trainer.on_rollouts, trainer.rollout_loss = on_rollouts, rollout_loss
    trainer.train()
    assert seen[:2] == seen[2:]
    assert sorted(map(len, seen)) == [4] * 4


def test_prompts_are_rendered_as_for_generation(grpo):
    trainer = grpo()
    assert trainer.token_ids_of(["a b", "c"]) == trainer.tokenizer(["a b", "c"])["input_ids"]


def test_a_checkpoint_can_be_written_at_any_time(grpo):
    trainer = grpo()
    trainer.train()
    folder = trainer.save_now()
    assert folder.endswith("checkpoint-2")
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {f.name for f in Path(folder).iterdir()}


def test_the_completions_table_shows_the_advantages_that_are_trained_on(tmp_path, tokenizer, prompts, student, teacher):
    trainer = in_training(
        OPDTrainer(
            model=student,
            teacher_model=teacher,
            reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
            args=config(tmp_path, num_generations=2),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
    )
    batch = trainer._generate_and_score_completions([{"prompt": "a"}] * 4)
    assert batch["advantages"].tolist() == [-1.0, 1.0, -1.0, 1.0]
    assert list(trainer._logs["advantages"]) == [-1.0, 1.0, -1.0, 1.0]


def test_private_names_stay_in_two_modules():
    """No other module imports from inside TRL or touches a private name of its trainer; none what is experimental."""
    private = {name for name in vars(GRPOTrainer) if name.startswith("_") and not name.startswith("__")}
    private |= {"_metrics", "_logs", "_tokenizer", "_is_vlm", "_step", "_buffered_inputs", "_entropy_bonus_enabled"}
    private -= {"_tag_names", "_name", "_paper"}  # what TRL has subclasses set
    for file in Path(trl_distill.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert "trl.experimental" not in text
        if file.name not in ("_trl.py", "grpo_hooks.py"):
            assert not re.search(r"^\s*(from|import) trl\.", text, re.MULTILINE), file.name
            assert not private & {name.lstrip(".") for name in re.findall(r"\._\w+", text)}, file.name


def test_pixels_are_split_by_row():
    """In all layouts: patches, images, tiles, and rows, which stay a tensor."""
    pixels = torch.arange(6.0).view(6, 1)
    patches = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 1, 2], [1, 2, 2]]), "num_images": [1, 0, 1]}
    found = _trl.split_pixel_values_by_grid(patches)
    assert [len(row) for row in found["pixel_values"]] == [2, 0, 4]
    assert [len(row) for row in found["image_grid_thw"]] == [1, 0, 1]
    found = _trl.split_pixel_values_by_grid({"pixel_values": pixels, "num_images": [2, 0, 4]})
    assert [len(row) for row in found["pixel_values"]] == [2, 0, 4]
    found = _trl.split_pixel_values_by_grid({"pixel_values": pixels, "num_images": [1, 1], "num_tiles": [2, 4]})
    assert [len(row) for row in found["pixel_values"]] == [2, 4]
    found = _trl.split_pixel_values_by_grid({"pixel_values": pixels, "num_images": [2, 0, 1, 1, 1, 2]})
    assert found["pixel_values"] is pixels


def test_images_stand_in_the_first_users_message():
    prompt = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    *_, user = _trl.prepare_multimodal_messages(prompt, images=["picture"])
    assert user["content"] == [{"type": "image", "image": "picture"}, {"type": "text", "text": "b"}]
