"""Two processes over gloo train as one process does on the same global batch: DDP, ZeRO-2, ZeRO-3 and FSDP2."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import make_model
from processes import succeeds
from safetensors.torch import load_file
from text_models import make_pair
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from vision_models import vision_pair


HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "deepspeed_configs"


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


ENGINES = {  # how two processes are launched, and what they must find themselves in
    "ddp": (TORCHRUN, ("MULTI_CPU", 2, None)),
    "zero2": (["accelerate.commands.launch", "--config_file", str(CONFIGS / "zero2_cpu.yaml")], ("DEEPSPEED", 2, 2)),
    "fsdp2": (TORCHRUN, ("FSDP", 2, None)),
    "zero3": (["accelerate.commands.launch", "--config_file", str(CONFIGS / "zero3_cpu.yaml")], ("DEEPSPEED", 2, 3)),
}


def launch(folder: Path, launcher: list[str], *options: str, flags: tuple[str, ...] = ()) -> list[dict]:
    """What each of two processes saw of a run on global batches of 8."""
    succeeds(
        [sys.executable, "-m", *launcher, HERE / "worker.py", *flags, folder, "4", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]


def alone(folder: Path, *options: str) -> dict:
    """The same in one process, forked from one that has imported everything: half of the time was imports."""
    sys.path[:0] = [] if str(HERE) in sys.path else [str(HERE)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker"])
    process = context.Process(target=import_module("worker").alone, args=(folder, options[0], set(options[1:])))
    process.start()
    process.join(600)
    process.kill()
    assert process.exitcode == 0
    return json.loads((folder / "result-0.json").read_text())


def on_two(engine: str, folder: Path, *options: str) -> list[dict]:
    """The same on two processes, which must have found themselves in the engine that was asked for."""
    launcher, expected = ENGINES[engine]
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed compiles an op on first use, and there is no g++")
    both = launch(folder, launcher, *options, flags=("--fsdp2",) if engine == "fsdp2" else ())
    assert [(r["distributed_type"], r["processes"], r["zero_stage"]) for r in both] == [expected] * 2
    return both


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What the run has saved."""
    adapter = folder / "out" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "out" / "model.safetensors")


def vector(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(state.items())])


def assert_same_run(results: list[dict], single: dict) -> None:
    for result in results:
        for ours, theirs in zip(result["steps"], single["steps"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.fixture
def models(saved, tokenizer) -> Path:
    """A student, a teacher of its own architecture, and a second one."""
    for name, seed in (("student", 1), ("teacher", 2), ("second", 3)):
        make_model("untied" if name == "student" else "tied", seed=seed).save_pretrained(saved / name)
        tokenizer.save_pretrained(saved / name)
    return saved


SHARDED = ("zero3", "fsdp2")
SLOW = pytest.mark.slow
RUNS = [
    ("ddp", "full"),
    pytest.param("ddp", "full rewards", marks=SLOW),
    pytest.param("ddp", "full rewards batch_baseline", marks=SLOW),
    pytest.param("ddp", "full rewards prompt_baseline", marks=SLOW),
    pytest.param("ddp", "full off_policy", marks=SLOW),
    pytest.param("ddp", "full lora", marks=SLOW),
    pytest.param("ddp", "full offload", marks=SLOW),
    pytest.param("ddp", "topk", marks=SLOW),
    pytest.param("ddp", "sampled", marks=SLOW),
    pytest.param("zero2", "full", marks=SLOW),
    pytest.param("zero2", "full rewards lora", marks=SLOW),
    pytest.param("zero2", "full offload", marks=SLOW),
    pytest.param("zero2", "full ema", marks=SLOW),
    pytest.param("zero3", "full", marks=SLOW),
    pytest.param("zero3", "full rewards", marks=SLOW),
    pytest.param("zero3", "full lora", marks=SLOW),
    pytest.param("zero3", "topk", marks=SLOW),
    pytest.param("zero3", "full routed", marks=SLOW),
    pytest.param("zero3", "full off_policy", marks=SLOW),
    pytest.param("fsdp2", "full", marks=SLOW),
    pytest.param("fsdp2", "full rewards", marks=SLOW),
    pytest.param("fsdp2", "full lora", marks=SLOW),
    pytest.param("fsdp2", "full lora adapter_off", marks=SLOW),
    pytest.param("fsdp2", "topk", marks=SLOW),
    pytest.param("fsdp2", "sampled", marks=SLOW),
    pytest.param("fsdp2", "full routed", marks=SLOW),
    pytest.param("fsdp2", "full off_policy", marks=SLOW),
]


@pytest.mark.parametrize(("engine", "options"), RUNS)
def test_two_processes_equal_one(models, engine, options):
    """With "routed" no process has a row of both teachers, and yet each takes part in the forward of both."""
    chosen = options.split()
    single = alone(models, *chosen)
    expected = vector(weights(models))
    both = on_two(engine, models, *chosen)
    assert_same_run(both, single)
    tight = engine == "ddp"
    torch.testing.assert_close(
        vector(weights(models)), expected, rtol=1e-4 if tight else 1e-3, atol=1e-6 if tight else 1e-5
    )
    if "rewards" in chosen:
        assert all(row["reward_std"] > 0 for row in single["steps"])
    if "prompt_baseline" in chosen:
        assert len(single["means"]) == 8
        assert [row["distill/known_prompts"] for row in single["steps"]] == [0, 1, 1]
    assert all(result["means"] == single["means"] for result in both)
    if "off_policy" in chosen:
        assert [row["distill/on_policy"] for row in single["steps"]] == [0.0, 1.0, 0.0]
    assert ("distill/reverse_kl/code" in single["steps"][0]) is ("routed" in chosen)
    for result in both:
        assert set(result["teacher_differs"]) <= {"ok", "warning"}  # before training, or in it if weights are sharded
        assert result["distance"] == both[0]["distance"]  # that of the tokens of all
        assert result["teacher_parameters"] == single["teacher_parameters"]
        assert result["teacher_is_shared"] is ("offload" in chosen)  # one copy for both processes
        share = result["teacher_parameters_held"] / result["teacher_parameters"]
        assert share <= 0.51 if engine in SHARDED else share == 1


TEXTS = [("ddp", ""), ("ddp", "offload"), ("zero2", ""), ("zero3", ""), ("fsdp2", "")]
TEXTS += [(engine, "routed") for engine in ("ddp", *SHARDED)]


@pytest.mark.parametrize(("engine", "more"), TEXTS)
@pytest.mark.slow
def test_two_processes_equal_one_with_another_tokenizer(tmp_path, engine, more):
    """With "routed" one process has no text for that teacher, and takes part in its forward passes all the same."""
    _, own, teacher, other = make_pair(tmp_path / "teacher")
    student, second = (  # greedy, the one writes many different completions
        make_model("untied", seed=seed, vocab_size=len(own), hidden_size=8, head_dim=4, initializer_range=1.0)
        for seed in (8, 3)
    )
    for model, tokenizer, name in ((student, own, "student"), (teacher, other, "teacher"), (second, own, "second")):
        model.config._name_or_path = ""
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options = ["full", "texts", *more.split()]
    single = alone(tmp_path, *options)
    expected = vector(weights(tmp_path))
    both = on_two(engine, tmp_path, *options)
    assert_same_run(both, single)
    assert all(0 < row["distill/exact_tokens"] < 1 for row in single["steps"])
    tight = engine == "ddp"
    torch.testing.assert_close(
        vector(weights(tmp_path)), expected, rtol=1e-4 if tight else 1e-3, atol=1e-6 if tight else 1e-5
    )
    if more == "routed":
        texts = [sum(result["sequences"]) for result in both]
        assert min(texts) == 0 < max(texts)


@pytest.fixture
def vision_models(tmp_path) -> Path:
    for name, seed in (("student", 1), ("teacher", 2)):
        model, processor = vision_pair("gemma3", seed=seed)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    return tmp_path


def loaded_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What the run has saved, as transformers reads it: ZeRO-3 gives the weights other names in the file."""
    if (folder / "out" / "adapter_model.safetensors").exists():
        return weights(folder)
    model, info = AutoModelForImageTextToText.from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.state_dict()


@pytest.mark.parametrize(
    ("engine", "more"),
    [("ddp", ""), ("ddp", "mixed"), ("ddp", "lora"), ("zero2", ""), ("zero3", ""), ("fsdp2", ""), ("fsdp2", "lora")],
)
@pytest.mark.slow
def test_two_processes_equal_one_with_images(vision_models, engine, more):
    """With "mixed" one process has all the pictures."""
    options = ["full", "images", *more.split()]
    single = alone(vision_models, *options)
    expected = loaded_weights(vision_models)
    assert_same_run(on_two(engine, vision_models, *options), single)
    found, tight = loaded_weights(vision_models), engine == "ddp"
    torch.testing.assert_close(
        vector(found), vector(expected), rtol=1e-4 if tight else 1e-3, atol=1e-6 if tight else 1e-5
    )


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.slow
def test_sharded_engines_refuse_pictures_in_some_rows_only(vision_models, engine):
    with pytest.raises(AssertionError, match="4 of 8 rows of a generation batch have images"):
        on_two(engine, vision_models, "full", "images", "mixed")


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize(("fault", "message"), [("same", "nothing to learn"), ("scaled", "logits")])
@pytest.mark.slow
def test_models_are_checked_on_the_first_rollouts_if_they_are_sharded(models, engine, fault, message):
    with pytest.raises(AssertionError, match=message):  # of the process that has ended, with its output
        on_two(engine, models, "full", fault)


@pytest.mark.slow
def test_rollouts_without_judged_tokens_show_nothing(models):
    """As a base model writes them at first: all are cut off, and masked."""
    for result in on_two("fsdp2", models, "full", "masked"):
        assert "error" not in result["teacher_differs"]
        assert len(result["steps"]) == 3


@pytest.mark.parametrize(
    "options", ["full rewards", "topk rewards", "topk rewards fp32_head", "full lora adapter_off rewards"]
)
@pytest.mark.slow
def test_in_16_bits_only_products_are_rounded(models, options):
    """The loss and what it is computed from stay in fp32, on the way into the student's forward pass and out of it."""
    single = alone(models, *options.split())  # in fp32; with rewards, rollouts are always the same
    for engine in ("ddp", "fsdp2"):
        for result in on_two(engine, models, *options.split(), "bf16"):
            first, expected = result["steps"][0], single["steps"][0]
            assert first["loss"] == pytest.approx(expected["loss"], rel=2e-2)
            assert first["distill/reverse_kl"] == pytest.approx(expected["distill/reverse_kl"], rel=2e-2)
            assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)
            rounded = [name for name, change in result["precision"].items() if change == 0.0]
            assert not rounded, (engine, result["precision"])
            of_estimator = "divergence" if "full" in options else "head_log_q"
            assert {"slopes", "entropy", of_estimator} <= set(result["precision"])


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.slow
def test_a_checkpoint_of_shards_resumes_and_the_saved_model_is_the_student(models, engine):
    on_two(engine, models, "full", "save")
    expected, live = weights(models), load_file(models / "live.safetensors")
    resumed = on_two(engine, models, "full", "save", "resume")
    assert len(resumed[0]["steps"]) == 3  # the first is the checkpoint's
    found = weights(models)
    torch.testing.assert_close(vector(found), vector(expected), rtol=1e-6, atol=1e-7)
    student = AutoModelForCausalLM.from_pretrained(models / "out")
    plain = AutoModelForCausalLM.from_pretrained(models / "student")
    assert {name: p.shape for name, p in student.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    assert set(expected) == set(live) == set(dict(plain.named_parameters()))  # and nothing of the teacher
    torch.testing.assert_close(vector(expected), vector(live), rtol=0, atol=0)


@pytest.mark.slow
def test_a_lock_that_a_killed_build_has_left_does_not_stop_later_runs(models):
    from trl_distill.training.deepspeed_ops import extensions_folder

    on_two("zero2", models, "full")  # builds what is missing
    lock = extensions_folder() / "deepspeed_shm_comm" / "lock"
    lock.touch()
    on_two("zero2", models, "full")
    assert not lock.exists()
