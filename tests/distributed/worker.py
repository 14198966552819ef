"""One process of a distributed run: trains a tiny student and writes what it saw as JSON.

    torchrun --nproc_per_node 2 tests/distributed/worker.py [--fsdp2] FOLDER PER_DEVICE_BATCH ESTIMATOR [OPTION ...]
    accelerate launch --config_file deepspeed_configs/zero3_cpu.yaml tests/distributed/worker.py ... (the same)

OPTIONs are listed in `main`. FOLDER holds `student` and `teacher`, saved with their
tokenizer. The result goes to `FOLDER/result-RANK.json`, the trained student to `FOLDER/out`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

if "--fsdp2" in sys.argv:  # before an accelerator is made
    sys.argv.remove("--fsdp2")
    import fsdp2_on_cpu  # noqa: F401

import torch
from datasets import Dataset
from helpers import config
from safetensors.torch import save_file

from trl_distill import OPDTrainer, distributed_main
from trl_distill.training.deepspeed_ops import build_ops


LOGGED = ("loss", "grad_norm", "distill/reverse_kl", "entropy", "reward", "reward_std", "objective", "policy_loss")
LOGGED += ("distill/reverse_kl/math", "distill/reverse_kl/code", "distill/off_policy/forward_kl", "distill/on_policy")
LOGGED += ("distill/known_prompts", "distill/exact_tokens", "distill/non_canonical")


GROUP = 8  # with two processes it lies on both


def letters(completions, **_) -> list[float]:
    return [text.count("a") + 0.1 * len(text) for text in completions]


def written_out(prompts, trainer) -> dict[str, list]:
    """Rollouts that hang on the row's place in the global batch alone: the same for any number of processes."""
    tokenizer, first = trainer.processing_class, trainer.accelerator.process_index * len(prompts)
    places = [(first + i) % GROUP for i in range(len(prompts))]
    texts = [" ".join("abcaefgh"[place:]) for place in places]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts],
        "logprobs": None,
    }


def student_of(folder: Path, lora: bool) -> dict:
    """The student, or an adapter on it whose weights do not hang on the order of random numbers."""
    if not lora:
        return {"model": str(folder / "student")}
    from peft import LoraConfig

    return {"model": str(folder / "student"), "peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}


def set_adapter(trainer: OPDTrainer) -> None:
    """Write known weights into an adapter, which no engine has sharded yet: initialisation draws random ones."""
    for i, (name, parameter) in enumerate(trainer.model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).roll(i).view_as(parameter))


def live_weights(trainer: OPDTrainer) -> dict[str, torch.Tensor]:
    """What is trained, as it is in memory at the end."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name: tensor.clone().cpu() for name, tensor in state.items()} if state else {}


def scale_logits() -> None:
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = 1.1 * output.logits
        return output

    LlamaForCausalLM.forward = forward


def held_here(parameter: torch.Tensor) -> int:
    """Elements of a parameter that this process holds."""
    if hasattr(parameter, "to_local"):  # FSDP2
        return parameter.to_local().numel()
    return getattr(parameter, "ds_tensor", parameter).numel()  # ZeRO-3


def watch_precision(trainer: OPDTrainer) -> dict[str, float]:
    """By name, the largest change that rounding to bf16 would make to what the losses are computed from."""
    seen: dict[str, float] = {}

    def watch(name: str, tensor: torch.Tensor) -> None:
        exact = tensor.dtype == torch.float32 and tensor.numel() > 0
        change = (tensor - tensor.bfloat16().float()).abs().max().item() if exact else 0.0
        seen[name] = max(seen.get(name, 0.0), change)

    measure, term = trainer.estimator.measure, trainer.estimator.term

    def watched_measure(*args, slopes=None, **more):
        if slopes is not None and slopes.divergence is not None:  # that of texts is not expected
            watch("slopes", slopes.divergence)
        return measure(*args, slopes=slopes, **more)

    def watched_term(measured, *args):
        for name, tensor in measured.tensors().items():
            if tensor.is_floating_point():
                watch(name, tensor)
        return term(measured, *args)

    trainer.estimator.measure, trainer.estimator.term = watched_measure, watched_term
    return seen


def with_images(mixed: bool) -> Dataset:
    """A picture, or two, for each row; if `mixed`, only for the rows of the first of two processes."""
    from vision_models import picture

    rows = []
    for i in range(32):
        images = [picture(10 * i + j) for j in range(1 + i % 2)]
        prompt = [{"role": "user", "content": "What is it?"[: 4 + i % 8]}]
        rows.append({"prompt": prompt, "images": [] if mixed and i % 8 >= 4 else images})
    return Dataset.from_list(rows)


def count_sequences() -> list[int]:
    """How many texts a teacher with another tokenizer has on this process, at each call."""
    from trl_distill.teachers import cross_tokenizer

    original, counts = cross_tokenizer.aligned_rows, list[int]()

    def counting(*args):
        rows = original(*args)
        counts.append(sum(len(row.aligned.paths) for row in rows))
        return rows

    cross_tokenizer.aligned_rows = counting
    return counts


def in_shared_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in memory that this process shares with others."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        (start, end), permissions = (int(x, 16) for x in line.split()[0].split("-")), line.split()[1]
        if start <= tensor.data_ptr() < end:
            return permissions.endswith("s")
    return False


@distributed_main
def main(folder: Path, per_device_batch: int, estimator: str, options: set[str]) -> None:
    torch.set_num_threads(1)
    unknown = options - {
        "rewards",
        "routed",
        "off_policy",
        "lora",
        "save",
        "resume",
        "offload",
        "ema",
        "bf16",
        "adapter_off",
        "same",
        "scaled",
        "masked",
        "fp32_head",
        "batch_baseline",
        "prompt_baseline",
        "texts",
        "images",
        "mixed",
    }
    if unknown:
        raise SystemExit(f"There is no option {unknown}.")
    rewards, off_policy = "rewards" in options, "off_policy" in options
    baseline = next((kind for kind in ("batch", "prompt") if f"{kind}_baseline" in options), "group")
    prompts = Dataset.from_dict({"prompt": [" ".join("abcdefgh"[i % 8 :][: 1 + i % 5]) + " z" for i in range(32)]})
    if baseline == "prompt":  # each batch holds all of them
        prompts = prompts.select(range(8))
    if "texts" in options:  # of letters, for a student and a teacher whose tokenizers are over pieces of them
        texts = ["a", "bab", "abb", "ba", "aab", "bbab", "aba", "bb"]
        prompts = Dataset.from_dict({"prompt": [texts[i % 8] + "ab" * (i // 8) for i in range(32)]})
    if "images" in options:  # for vision-language models
        prompts = with_images("mixed" in options)
        # for FSDP2: by itself accelerate looks for a pooling head as well, which Gemma 3 has not
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Gemma3DecoderLayer,SiglipEncoderLayer"
    sequences = count_sequences()
    teacher = str(folder / ("student" if "same" in options else "teacher"))
    if "scaled" in options:  # a model whose logits are not those of its head
        scale_logits()
    if "routed" in options:  # with two processes, one has all rows of the one teacher, the other those of the other
        prompts = prompts.add_column("teacher", (["math"] * 4 + ["code"] * 4) * 4)
    if off_policy:
        prompts = prompts.add_column("completion", [" ".join("abcaefgh"[i % 7 :]) for i in range(32)])
    if "ema" in options:
        prompts = prompts.add_column("teacher_prompt", ["h"] * 32)
    trainer = OPDTrainer(
        **student_of(folder, "lora" in options),
        teacher_model={"math": teacher, "code": str(folder / "second")}
        if "routed" in options
        else None
        if "ema" in options
        else "adapter-off"
        if "adapter_off" in options
        else teacher,
        reward_funcs=[letters] if rewards else None,
        args=config(
            folder / "out",
            per_device_train_batch_size=per_device_batch,
            max_steps=3,
            kl_estimator=estimator,
            kl_top_k=4,
            num_generations=GROUP if rewards and baseline == "group" else 2 if off_policy else 1,
            reward_baseline=baseline,
            lmbda=0.5 if off_policy else 1.0,
            shuffle_dataset=not {"routed", "mixed"} & options,
            teacher_offload="offload" in options,
            teacher_ema=0.8 if "ema" in options else None,
            cross_tokenizer="texts" in options,
            kl_discount=0.5 if "texts" in options else 0.0,
            bf16="bf16" in options,
            cast_lm_head_to_fp32="fp32_head" in options,
            mask_truncated_completions="masked" in options,
            max_completion_length=1 if "masked" in options else 8,
            assume_different_teacher="adapter_off" in options,
            max_grad_norm=1e9,
            adam_epsilon=1e-3,  # far below most gradients; with 1e-8 the rounding of the smallest became a whole update
            save_strategy="steps" if "save" in options else "no",
            save_steps=1,
            ddp_backend="gloo",
            use_cpu=os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",  # would switch DeepSpeed off
        ),
        train_dataset=prompts,
        rollout_func=written_out if rewards else None,
    )
    set_adapter(trainer)
    seen = watch_precision(trainer)
    trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-1") if "resume" in options else None)
    trainer.save_model(str(folder / "out"))
    live = live_weights(trainer)
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        save_file(live, folder / "live.safetensors")
    judge = getattr(trainer.teacher, "teacher", trainer.teacher)  # of one that reads texts, who reads them
    held = list(getattr(judge, "model", trainer.model).parameters())
    result = {
        "distributed_type": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "zero_stage": accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        "teacher_differs": [f.level for f in trainer.preflight.findings if f.check.startswith("teacher differs")],
        "teacher_parameters_held": sum(held_here(p) for p in held),
        "teacher_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in held),
        "teacher_is_shared": "offload" in options
        and all(in_shared_memory(p) for p in judge.model.model.layers.parameters()),
        "distance": [f.found for f in trainer.preflight.findings if f.check.startswith("teacher differs")],
        "precision": seen,
        "sequences": sequences,
        "means": None if trainer.baseline is None else sorted(trainer.baseline._seen.items()),
        "steps": [
            {key: row[key] for key in LOGGED if key in row} for row in trainer.state.log_history if "loss" in row
        ],
    }
    (folder / f"result-{accelerator.process_index}.json").write_text(json.dumps(result))


def alone(folder: Path, estimator: str, options: set[str]) -> None:
    """The only process of a run, as torchrun would start it."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(place)
    main(folder, 8, estimator, options)


if __name__ == "__main__":
    build_ops()
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], set(sys.argv[4:]))
