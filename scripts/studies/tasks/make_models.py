"""Make the demo's two models again from scratch: a teacher, and a weaker student made by SFT on a few of its answers.

    python -m scripts.studies.tasks.make_models --output_dir scripts/studies/tasks/models

1. A byte-pair tokenizer is trained on the task's own text (digits stay single tokens).
2. The teacher (Qwen3 classes, 0.6 M parameters) learns the written-out solutions by SFT.
3. The teacher answers `--sft_samples` problems by sampling; the student (0.35 M) learns those answers by SFT.
   Nothing else is done to it. The number of samples is chosen for a demo: with many, SFT alone closes the gap; with
   very few, the student learns nothing that on-policy distillation could build on.

About half an hour on two cores. The models in the repository were made this way, the teacher on additions that
reasoning-gym's `chain_sum` drew, so the new ones are alike, not the same bit for bit. Left out: a search for the best
teacher.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from scripts.studies.tasks.additions import MAX_COMPLETION_LENGTH, correct, problems


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(
    pieces: str = r"\d| |\+|=", size: int = 128, rows: int = 500, every_byte: bool = False
) -> PreTrainedTokenizerFast:
    """
    A byte-pair tokenizer of the task's text.

    Args:
        pieces (`str`): regular expression of what text is cut into before; no token goes across two pieces.
        size (`int`): of the vocabulary, at most.
        rows (`int`): problems whose text it is trained on.
        every_byte (`bool`): whether it has a token for each byte, also for those that are not in the text.
    """
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pieces), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    written = problems(rows, seed=0)
    text = [row["prompt"][0]["content"] for row in written] + list(written["solution"])
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if every_byte else []
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, heads: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden_size // heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def sft(
    model, tokenizer, dataset, steps: int, batch_size: int, learning_rate: float, seed: int, callbacks=None
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, steps // 10),
            weight_decay=0.01,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            seed=seed,
        )
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=callbacks
        )
        trainer.train()


@torch.no_grad()
def answer(model, tokenizer, rows, seed: int, batch_size: int = 250) -> list[str]:
    """One sampled completion (temperature 1) for each row, as text."""
    set_seed(seed)
    model.eval()
    texts: list[str] = []
    for start in range(0, len(rows), batch_size):
        batch = tokenizer.apply_chat_template(
            rows[start : start + batch_size]["prompt"],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        output = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=MAX_COMPLETION_LENGTH)
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def as_conversation(rows, completions: list[str]):
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "prompt": rows["prompt"],
            "completion": [[{"role": "assistant", "content": text}] for text in completions],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--teacher_steps", type=int, default=2000)
    parser.add_argument("--sft_samples", type=int, default=200, help="teacher answers that the student is started from")
    parser.add_argument("--sft_steps", type=int, default=600)
    parser.add_argument("--teacher", type=Path, help="start from this teacher instead of training one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    set_seed(options.seed)
    if options.teacher is None:
        tokenizer = make_tokenizer()
        teacher = make_model(tokenizer, hidden_size=128, layers=4, heads=4)
        rows = problems(100_000, seed=1)
        sft(
            teacher,
            tokenizer,
            as_conversation(rows, list(rows["solution"])),
            options.teacher_steps,
            128,
            2e-3,
            options.seed,
        )
        teacher.save_pretrained(options.output_dir / "teacher")
        tokenizer.save_pretrained(options.output_dir / "teacher")
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.teacher)
        teacher = Qwen3ForCausalLM.from_pretrained(options.teacher)

    held_out = problems(500, seed=3_000_000)
    score = correct(answer(teacher, tokenizer, held_out, options.seed), held_out["answer"])
    print(f"teacher: {teacher.num_parameters():,} parameters, accuracy {sum(score) / len(score):.3f}", flush=True)

    set_seed(options.seed)
    student = make_model(tokenizer, hidden_size=96, layers=4, heads=4)
    rows = problems(options.sft_samples, seed=2_000_000)
    samples = as_conversation(rows, answer(teacher, tokenizer, rows, options.seed))
    sft(student, tokenizer, samples, options.sft_steps, 50, 1e-3, options.seed)
    score = correct(answer(student, tokenizer, held_out, options.seed), held_out["answer"])
    print(f"student: {student.num_parameters():,} parameters, accuracy {sum(score) / len(score):.3f}")
    student.save_pretrained(options.output_dir / "student")
    tokenizer.save_pretrained(options.output_dir / "student")
    print(f"Models are in {options.output_dir}")


if __name__ == "__main__":
    main()
