"""What the benchmark measures on: models by size, rollouts by length, and the named cells of each preset.

A cell is one shape and the contenders that run on it. Lengths stand at the quantiles of their distribution, so that a
"ragged" batch of eight rows is ragged in the same way on every seed; order and token ids are drawn. Who the contenders
are is in `contenders.py`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, set_seed


PAD, EOS, FIRST = 0, 1, 3  # ids from `FIRST` on are drawn


RAGGED = 10  # longest completion, in medians


@dataclass(frozen=True)
class Size:
    """A model shaped like Qwen3, with tied embeddings."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 64


@dataclass(frozen=True)
class Cell:
    """One shape; `tokens` is the length of a completion, or with `ragged` the median."""

    name: str
    student: Size
    teacher: Size
    contenders: tuple[str, ...]
    vocab: int = 32_000
    tokens: int = 80
    prompt: int = 16
    ragged: bool = False
    rows: int = 8  # per optimizer step
    micro_batch: int = 2  # rows per forward
    group: int = 1  # completions per prompt
    lora: bool = False
    teachers: int = 1  # alike, each with the same weight
    dtype: str = "float32"
    timed: bool = True
    turns: int = 1  # for one of `--repeats`
    generates: bool = False  # also measured with generation
    axis: str = ""  # of the growth that this cell is a point of
    at: float = 0.0  # where on that axis

    def lengths(self) -> list[int]:
        """Tokens of each completion, its stop token included, in ascending order."""
        if not self.ragged:
            return [self.tokens] * self.rows
        normal = NormalDist()
        quantiles = [(row + 0.5) / self.rows for row in range(self.rows)]
        sigma = math.log(RAGGED) / normal.inv_cdf(quantiles[-1])
        return [max(2, round(self.tokens * math.exp(sigma * normal.inv_cdf(q)))) for q in quantiles]

    def shrunk(self) -> Cell:
        """The same cell in miniature, for a rehearsal."""
        tiny = Size(32, 2, 64, 2, 1, 16)
        small: dict[str, Any] = {"student": tiny, "teacher": replace(tiny, hidden=48, layers=3), "prompt": 4}
        return replace(self, turns=1, vocab=max(64, self.vocab // 256), tokens=max(3, self.tokens // 256), **small)


@dataclass(frozen=True)
class Rollouts:
    """Token ids of each row; rows of one prompt stand together."""

    prompts: list[list[int]]
    completions: list[list[int]]

    @property
    def tokens(self) -> int:
        """Of prompts and completions."""
        return sum(map(len, self.prompts)) + self.completion_tokens

    @property
    def completion_tokens(self) -> int:
        return sum(map(len, self.completions))


def make_rollouts(cell: Cell, seed: int = 0) -> Rollouts:
    """Random ids; each completion ends with the stop token, which stands nowhere else."""
    draw = random.Random(seed)
    lengths = cell.lengths()
    draw.shuffle(lengths)
    asked = [[draw.randrange(FIRST, cell.vocab) for _ in range(cell.prompt)] for _ in range(cell.rows // cell.group)]
    return Rollouts(
        prompts=[asked[row // cell.group] for row in range(cell.rows)],
        completions=[[draw.randrange(FIRST, cell.vocab) for _ in range(n - 1)] + [EOS] for n in lengths],
    )


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One word for each id: "w17" is 17."""
    special = ["<pad>", "<eos>", "<unk>"]  # else "w1" would be found in "w17"
    words = [*special, *(f"w{i}" for i in range(FIRST, vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, eos, unknown = special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unknown, padding_side="left"
    )


def make_model(size: Size, cell: Cell, seed: int, device: torch.device) -> Any:
    """Random weights, the same on each call."""
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=cell.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=40_960,
        initializer_range=size.hidden**-0.5,  # logits of variance 1, so that a divergence is not zero by accident
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cell.dtype))
    model.generation_config.eos_token_id = EOS
    return model


PURE = ("ours", "distillation")


ALL_PURE = (*PURE, "gkd")


ESTIMATORS = ("ours, top-k", "ours, sampled")


COMBINED = ("ours, combined", "grpo")


METRICS = ("ours", "ours, without metrics")


KERNELS = ("ours", "ours, own head")  # on a GPU the default is TRL's kernel


def cpu_cells() -> list[Cell]:
    student, teacher = Size(256, 6, 768, 4, 2), Size(512, 8, 1536, 8, 4)
    base = Cell("", student, teacher, PURE)
    narrow = replace(base, student=Size(128, 4, 384, 4, 2, 32), teacher=Size(256, 6, 768, 4, 2), vocab=152_000)
    ragged: dict[str, Any] = {"ragged": True, "tokens": 20}  # up to 200
    return [
        replace(base, name="uniform", contenders=ALL_PURE, generates=True),
        replace(base, name="ragged", contenders=ALL_PURE, generates=True, **ragged),
        replace(base, name="ragged, estimators", contenders=("ours", *ESTIMATORS), **ragged),
        replace(base, name="uniform, LoRA", lora=True),
        replace(base, name="ragged, LoRA", lora=True, **ragged),
        replace(narrow, name="uniform, 152k", tokens=48),
        replace(narrow, name="ragged, 152k", ragged=True, tokens=10),
        replace(base, name="uniform, combined", contenders=COMBINED, group=4),
        replace(base, name="ragged, combined", contenders=COMBINED, group=4, **ragged),
        replace(base, name="uniform, metrics", contenders=METRICS, turns=5),
        replace(
            narrow,
            name="4k tokens, 152k",
            contenders=ALL_PURE,
            student=Size(64, 2, 192, 2, 1, 32),
            teacher=Size(128, 2, 384, 4, 2, 32),
            tokens=512,
            timed=False,
        ),
    ]


def gpu_cells() -> list[Cell]:
    student, teacher = Size(1024, 28, 3072, 16, 8, 128), Size(2560, 36, 9728, 32, 8, 128)
    base = Cell("", student, teacher, PURE, vocab=151_936, tokens=2048, prompt=256, dtype="bfloat16")
    ragged: dict[str, Any] = {"ragged": True, "tokens": 800}  # up to 8000
    return [
        replace(base, name="uniform", contenders=(*KERNELS, "distillation", "gkd"), generates=True),
        replace(base, name="ragged", contenders=(*KERNELS, "distillation"), generates=True, **ragged),
        replace(base, name="ragged, estimators", contenders=("ours", *ESTIMATORS), **ragged),
        replace(base, name="uniform, LoRA", lora=True),
        replace(base, name="ragged, LoRA", lora=True, **ragged),
        replace(base, name="uniform, 32k", vocab=32_000, contenders=(*KERNELS, "distillation")),
        replace(base, name="ragged, 32k", vocab=32_000, **ragged),
        replace(base, name="uniform, combined", contenders=COMBINED, group=4),
        replace(base, name="ragged, combined", contenders=COMBINED, group=4, **ragged),
    ]


def real_cells() -> list[Cell]:
    """
    Students shaped like SmolLM2-135M and like eight layers of Qwen3-0.6B, teachers like SmolLM2-360M and like eight
    layers of Qwen3-1.7B: layers and heads have the proportions that they have in use.

    Ours alone, beside the floor: TRL's trainers are beside ours in the cells of `cpu_cells`.
    """
    smol = Cell("", Size(576, 30, 1536, 9, 3), Size(960, 32, 2560, 15, 5), ("ours",), vocab=49_152, tokens=48)
    smol = replace(smol, micro_batch=4)
    qwen = replace(smol, student=Size(1024, 8, 3072, 16, 8, 128), teacher=Size(2048, 8, 6144, 16, 8, 128))
    qwen = replace(qwen, vocab=151_936, tokens=32)
    rewarded: dict[str, Any] = {"contenders": ("ours, combined",), "group": 4}
    return [
        replace(smol, name="135M", generates=True),
        replace(qwen, name="0.6B, 8 layers", generates=True),
        replace(smol, name="135M, combined", generates=True, **rewarded),
        replace(smol, name="135M, LoRA", lora=True),
        replace(smol, name="135M, LoRA, combined", lora=True, **rewarded),
        replace(qwen, name="0.6B, 8 layers, LoRA", lora=True),
        replace(qwen, name="0.6B, 8 layers, combined", **rewarded),
        replace(qwen, name="0.6B, 8 layers, LoRA, combined", lora=True, **rewarded),
        replace(smol, name="135M, ragged", ragged=True, tokens=20),
    ]


def growth_cells(gpu: bool) -> list[Cell]:
    """
    Points on three axes: tokens per step, vocabulary, parameters of the teacher's layers.

    On "wide", tokens grow once more with four times the vocabulary, in memory alone: hidden states do not know of it.
    """
    tokens: tuple[int, ...]
    if gpu:
        base = replace(gpu_cells()[0], contenders=PURE, rows=4, generates=False, tokens=1024, vocab=32_000)
        tokens, vocabularies, layers = (512, 1024, 2048, 4096), (32_000, 64_000, 151_936), (9, 18, 36)
    else:
        student, teacher = Size(128, 4, 384, 4, 2, 32), Size(256, 6, 768, 4, 2)
        base = Cell("", student, teacher, PURE, vocab=16_000, tokens=48)
        tokens, vocabularies, layers = (48, 112, 240), (8_000, 32_000, 152_000), (3, 8, 16)
    cells = [replace(base, axis="tokens", at=base.rows * (base.prompt + n), tokens=n) for n in tokens]
    wide = replace(base, vocab=4 * base.vocab, timed=False)
    cells += [replace(wide, axis="wide", at=wide.rows * (wide.prompt + n), tokens=n) for n in (tokens[0], tokens[-1])]
    cells += [replace(base, axis="vocabulary", at=v, vocab=v) for v in vocabularies]
    for deep in layers:
        size = replace(base.teacher, layers=deep)
        cells.append(replace(base, axis="teacher", at=sum(map(math.prod, projections(size))) / 1e6, teacher=size))
    return [replace(cell, name=f"{cell.axis} {cell.at:.6g}") for cell in cells]


def far_cells() -> list[Cell]:
    """Points on five axes for ours alone, each axis long enough for its slope to show."""
    base = Cell("", Size(128, 4, 384, 4, 2, 32), Size(256, 6, 768, 4, 2), ("ours",), vocab=16_000, tokens=48)
    row = replace(base, student=Size(64, 2, 192, 2, 1, 32), teacher=Size(128, 2, 384, 4, 2, 32), vocab=4_000)
    row, group = replace(row, rows=1, micro_batch=1), replace(base, contenders=("ours, combined",), prompt=64)
    points: list[tuple[str, float, Cell]] = []
    points += [("length", n, replace(row, tokens=n)) for n in (512, 2048, 8192, 32_768)]
    points += [("vocabulary", n, replace(base, vocab=n)) for n in (8_000, 32_000, 128_000)]
    points += [("group", n, replace(group, group=n, rows=n)) for n in (4, 8, 16, 32)]
    for layers in (4, 8, 16, 32):
        size = replace(base.teacher, layers=layers)
        points.append(("teacher", sum(map(math.prod, projections(size))) / 1e6, replace(base, teacher=size)))
    points += [("teachers", n, replace(base, teachers=n)) for n in (1, 2, 4)]
    return [replace(cell, axis=axis, at=at, name=f"{axis} {at:.6g}") for axis, at, cell in points]


def projections(size: Size) -> list[tuple[int, int, int]]:
    """`(count, in, out)` of a backbone's linear maps."""
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    return [
        (size.layers, size.hidden, queries),
        (2 * size.layers, size.hidden, keys),
        (size.layers, queries, size.hidden),
        (2 * size.layers, size.hidden, size.intermediate),
        (size.layers, size.intermediate, size.hidden),
    ]


def preset(name: str, dry_run: bool) -> list[Cell]:
    """The cells of a preset, those of its growth at the end."""
    cells = {
        "cpu": lambda: [*cpu_cells(), *growth_cells(gpu=False)],
        "real": real_cells,
        "growth": far_cells,
        "gpu": lambda: [*gpu_cells(), *growth_cells(gpu=True)],
    }[name]()
    return [cell.shrunk() for cell in cells] if dry_run else cells
