"""Make the two models of the miniature with images from scratch: a teacher that reads pictures, and a weaker student.

    python -m scripts.studies.images.make_models --output_dir scripts/studies/images/models

Both are of Idefics 3's classes (as SmolVLM: a SigLIP tower, a linear connector, a Llama), which read a picture as 16
image tokens, and have one tokenizer of words. They learn right answers by ordinary supervised training; the student is
smaller and stops early. Weights are saved in bfloat16. Left out: a search for the best teacher.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from scripts.studies.images.drawings import COLOURS, SHAPES, SIDE, WORDINGS, correct, problems
from scripts.studies.images.reader import answers, encode


PATCH, MERGED = 4, 2  # pixels of a patch's side; patches of an image token's side
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_processor() -> Idefics3Processor:
    """Words, and pictures as they are: 32 pixels on a side, in one piece."""
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"]
    special += ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|unknown|>"]
    words = [*"1234", *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES)]
    words += sorted({word for wording in WORDINGS for word in wording.split()})
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + words)}, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # words with a space between
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    edge = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    return Idefics3Processor(images, fast, image_seq_len=(SIDE // PATCH // MERGED) ** 2, chat_template=CHAT_TEMPLATE)


def make_model(processor: Any, hidden_size: int, layers: int) -> Any:
    """A random model; tower and text model have the same width and number of layers, and heads of 16."""
    tokenizer = processor.tokenizer
    shared = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": hidden_size // 16}
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            **shared,
            "vocab_size": len(tokenizer),
            "intermediate_size": 2 * hidden_size,
            "num_key_value_heads": hidden_size // 16,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        },
        vision_config={**shared, "intermediate_size": 2 * hidden_size, "image_size": SIDE, "patch_size": PATCH},
        image_token_id=processor.image_token_id,
        scale_factor=MERGED,
        tie_word_embeddings=True,
    )
    return AutoModelForImageTextToText.from_config(config)


def supervise(model: Any, processor: Any, steps: int, seed: int, learning_rate: float, batch_size: int = 32) -> None:
    """Cross-entropy of the right answers, each picture once; AdamW with warm-up and a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = min(100, steps // 5)
    cosine = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=warmup / steps)
    tokenizer, start, losses = processor.tokenizer, time.perf_counter(), []
    model.train()
    for step in range(steps):
        rows = problems(batch_size, seed=seed + step)[:]
        inputs = encode(processor, rows)
        targets = tokenizer([f"{text}<|end|>" for text in rows["answer"]], return_tensors="pt")["input_ids"]  # (B, 4)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], targets], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(targets)], dim=1)
        logits = model(**inputs).logits[:, -targets.shape[1] - 1 : -1]  # (B, 4, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            recent, seconds = sum(losses[-50:]) / 50, time.perf_counter() - start
            print(f"step {step + 1} of {steps}: loss {recent:.3f}, {seconds:.0f} s", flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--teacher_steps", type=int, default=1500)
    parser.add_argument("--student_steps", type=int, default=400)
    parser.add_argument("--held_out", type=int, default=500)
    parser.add_argument(
        "--only", choices=("student", "teacher"), help="make this one; they do not depend on each other"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)

    processor, held_out = make_processor(), problems(options.held_out, seed=3_000_000)
    plans = {  # width, layers, steps, seed of the pictures
        "student": (64, 2, options.student_steps, 2_000_000),
        "teacher": (64, 3, options.teacher_steps, 1_000_000),
    }
    for name in [options.only] if options.only else plans:
        hidden_size, layers, steps, seed = plans[name]
        set_seed(options.seed)
        model = make_model(processor, hidden_size, layers)
        print(f"{name}: {model.num_parameters():,} parameters", flush=True)
        supervise(model, processor, steps, seed, learning_rate=2e-3)
        model.to(torch.bfloat16).save_pretrained(options.output_dir / name)
        processor.save_pretrained(options.output_dir / name)
        model.float()  # what is measured is what was saved
        right = correct(answers(model, processor, held_out, options.seed), held_out["answer"])
        print(f"{name}: accuracy {sum(right) / len(right):.3f}", flush=True)
    print(f"Models are in {options.output_dir}")


if __name__ == "__main__":
    main()
