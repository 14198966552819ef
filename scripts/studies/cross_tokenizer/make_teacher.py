"""Make a teacher for the demo's task that has another tokenizer than the demo's student.

    python -m scripts.studies.cross_tokenizer.make_teacher --output_dir cross_tokenizer_teacher

1. A byte-pair tokenizer with other merges is trained on the task's text: up to two digits are one token, with the space
   before them, where the demo's has single digits.
2. The demo's teacher gets an embedding for it, the mean of its own tokens' embeddings, and learns the written-out
   solutions by SFT once more.

Some ten minutes on a CPU. Left out: a search for a better teacher.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, set_seed

from scripts.studies.tasks.additions import correct, problems
from scripts.studies.tasks.make_models import answer, as_conversation, make_tokenizer, sft


DEMO = Path(__file__).parents[1] / "tasks" / "models"


PIECES = r" ?[A-Za-z]+| ?\d{1,2}| ?[^\sA-Za-z\d]+|\s+"  # up to two digits and the space before them are one piece


@torch.no_grad()
def with_tokenizer(model: Any, own: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The model with an embedding for another tokenizer: of each token, the mean over its own tokens for that text."""
    old = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(len(other))
    weight = model.get_input_embeddings().weight
    for i in range(len(other)):
        token = other.convert_ids_to_tokens(i)
        ids = [own.convert_tokens_to_ids(token)] if token in own.all_special_tokens else own.encode(other.decode([i]))
        weight[i] = old[ids].mean(0) if ids else old.mean(0)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("cross_tokenizer_teacher"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    set_seed(options.seed)
    own = PreTrainedTokenizerFast.from_pretrained(DEMO / "teacher")
    other = make_tokenizer(PIECES, size=640, rows=2000, every_byte=True)
    teacher = with_tokenizer(Qwen3ForCausalLM.from_pretrained(DEMO / "teacher"), own, other)
    for settings in (teacher.config, teacher.generation_config):
        settings.eos_token_id, settings.pad_token_id = other.eos_token_id, other.pad_token_id
    rows = problems(64 * options.steps, seed=1)
    sft(teacher, other, as_conversation(rows, list(rows["solution"])), options.steps, 64, 1.5e-3, options.seed)
    teacher.save_pretrained(options.output_dir)
    other.save_pretrained(options.output_dir)
    held_out = problems(500, seed=3_000_000)
    score = correct(answer(teacher, other, held_out, options.seed), held_out["answer"])
    print(f"teacher: {teacher.num_parameters():,} parameters, accuracy {sum(score) / len(score):.3f}")


if __name__ == "__main__":
    main()
