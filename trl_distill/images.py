"""What vision-language models read besides token ids: pixels, their sizes, and the kinds of tokens, row by row.

TRL concatenates the pixels of a batch in the order of its rows, in a layout that depends on the family (patches,
images, tiles or rows). Here they are kept for each row, so that any choice of rows can be made of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ._trl import split_pixel_values_by_grid


PIXELS = (  # arguments of models with pixels or what belongs to them; TRL's batches have them under the same names
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)


KINDS = ("token_type_ids", "mm_token_type_ids")  # arguments with a value per token, `(B, T)`: 0 on text


COUNTS = ("num_images", "num_tiles")  # lists in TRL's batches, with a number per row


@dataclass(frozen=True)
class EncodedPrompt:
    """
    A prompt as a model reads it.

    Attributes:
        ids (`list[int]`): P token ids, those of images included.
        pixels (`dict` of `torch.Tensor`): arguments of the model, see `PIXELS`; empty without images.
        kinds (`dict` of `torch.Tensor` of shape `(P,)`): arguments of the model, see `KINDS`.
        images (`int`): number of images.
    """

    ids: list[int]
    pixels: dict[str, torch.Tensor] = field(default_factory=dict)
    kinds: dict[str, torch.Tensor] = field(default_factory=dict)
    images: int = 0


@dataclass(frozen=True)
class Images:
    """
    The images of a batch of B rows.

    Attributes:
        rows (`tuple` of `dict[str, torch.Tensor]`): for each row the model's arguments with its pixels; empty where
            there is no image.
        kinds (`dict` of `torch.Tensor` of shape `(B, T)`): the model's arguments with the kinds of tokens.
    """

    rows: tuple[dict[str, torch.Tensor], ...]
    kinds: dict[str, torch.Tensor]

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> Images | None:
        """From a batch of `GRPOTrainer`; `None` if it has neither images nor kinds of tokens."""
        found = {name: inputs[name] for name in PIXELS if inputs.get(name) is not None}
        kinds = {name: inputs[name] for name in KINDS if inputs.get(name) is not None}
        if not found and not kinds:
            return None
        counts = {name: inputs[name] for name in COUNTS if inputs.get(name) is not None}
        by_row = {name: _pieces(value) for name, value in split_pixel_values_by_grid({**found, **counts}).items()}
        rows = [{name: by_row[name][row] for name in found} for row in range(len(inputs["prompt_ids"]))]
        return cls(tuple(row if "pixel_values" in row and _shows_something(row) else {} for row in rows), kinds)

    @classmethod
    def of_prompts(cls, prompts: Sequence[EncodedPrompt], length: int, completion: int, device: Any) -> Images | None:
        """
        The images of left-padded prompts.

        Args:
            prompts (`list` of [`EncodedPrompt`]): one per row.
            length (`int`): columns of the prompts, P.
            completion (`int`): columns of the completions, C.
            device: of the tensors.

        Returns:
            [`Images`], *optional*: `None` if no prompt has any.
        """
        names = {name for prompt in prompts for name in prompt.kinds}
        if not names and not any(prompt.pixels for prompt in prompts):
            return None
        rows = tuple({name: value.to(device) for name, value in prompt.pixels.items()} for prompt in prompts)
        kinds = {}
        for name in sorted(names):
            values = [prompt.kinds.get(name, torch.zeros(len(prompt.ids), dtype=torch.long)) for prompt in prompts]
            padded = pad_sequence(values, batch_first=True, padding_side="left").to(device)
            kinds[name] = pad(padded, (length - padded.shape[1], completion))
        return cls(rows, kinds)

    def of_rows(self, index: Any) -> Images:
        """Those of some rows, by a slice, a mask `(B,)` or indices."""
        places = torch.arange(len(self.rows))[index.cpu() if isinstance(index, torch.Tensor) else index].tolist()
        return Images(tuple(self.rows[place] for place in places), {n: kind[index] for n, kind in self.kinds.items()})

    def of_columns(self, first: int, last: int) -> Images:
        """With the kinds of some tokens."""
        return Images(self.rows, {name: kind[:, first:last] for name, kind in self.kinds.items()})

    def prompts(self, ids: torch.Tensor, mask: torch.Tensor) -> list[EncodedPrompt]:
        """The rows' prompts, from their token ids and attention mask `(B, P)`."""
        found = []
        for row, kept in enumerate(mask.bool()):
            kinds = {name: kind[row, : len(kept)][kept].cpu() for name, kind in self.kinds.items()}
            found.append(EncodedPrompt(ids[row][kept].tolist(), self.rows[row], kinds, int(bool(self.rows[row]))))
        return found

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        """The model's arguments for these rows."""
        found = dict(self.kinds)
        for name in PIXELS:
            pieces = [row[name] for row in self.rows if name in row]
            if pieces:
                found[name] = torch.cat(_of_one_size(pieces))
        return found


def columns_of(prompts: Sequence[EncodedPrompt], length: int, completion: int) -> dict[str, Any]:
    """
    The columns of a batch of `GRPOTrainer` for the images of its prompts, as TRL names them; empty without images.

    Args:
        prompts (`list` of [`EncodedPrompt`]): one per row.
        length (`int`): columns of the prompts, P.
        completion (`int`): columns of the completions, C.
    """
    images = Images.of_prompts(prompts, length, completion, "cpu")
    if images is None:
        return {}
    padded = next((row for row in images.rows if _is_by_rows(row)), None)
    if padded is not None:
        nothing = {name: torch.zeros_like(value) for name, value in padded.items()}
        return by_rows(Images(tuple(row or nothing for row in images.rows), images.kinds).arguments)
    counts: dict[str, Any] = {"num_images": [prompt.images for prompt in prompts]} if any(images.rows) else {}
    pixels = [row["pixel_values"] for row in images.rows if "pixel_values" in row]
    tiles = [len(row.get("pixel_values", ())) for row in images.rows]
    by_tile = any("spatial_shapes" in row for row in images.rows) or (
        not any("image_grid_thw" in row for row in images.rows)
        and any(value.dim() == 4 for value in pixels)
        and tiles != counts.get("num_images")
    )
    return {**images.arguments, **counts, **({"num_tiles": tiles} if by_tile else {})}


def keys_of(images: Images | None, rows: int) -> torch.Tensor:
    """A hash of each row's pixels, `(B,)`, int64; 0 without images. It is the same on all processes."""
    if images is None:
        return torch.zeros(rows, dtype=torch.int64)
    found = []
    for row in images.rows:
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(row):
            value = row[name].float().cpu()
            digest.update(value[value != 0].numpy().tobytes())  # without padding to the size of other rows
        found.append(int.from_bytes(digest.digest(), "big", signed=True) if row else 0)
    return torch.tensor(found, dtype=torch.int64)


def by_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """
    A batch whose pixels lie row by row, each row padded to the same number of images (Idefics, SmolVLM), told as such.

    TRL takes this layout for the one with a row per image where, by chance, there are as many images as rows.
    """
    return {**batch, "num_images": [1] * len(batch["pixel_values"])} if _is_by_rows(batch) else batch


def without_empty(arguments: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments without pixels of no image, which TRL passes where no row of a batch has one."""
    if arguments.get("pixel_values") is None or _shows_something(arguments):
        return arguments
    return {name: value for name, value in arguments.items() if name not in PIXELS}


def _shows_something(pixels: dict[str, Any]) -> bool:
    """Whether there is an image; where rows are padded to the same number, one of which nothing is attended is none."""
    values = pixels["pixel_values"]
    return bool(len(values)) and (not _is_by_rows(pixels) or bool(pixels["pixel_attention_mask"].any()))


def _is_by_rows(pixels: dict[str, Any]) -> bool:
    """Whether pixels lie row by row, each row padded to the same number of images (Idefics, SmolVLM)."""
    values = pixels.get("pixel_values")
    return isinstance(values, torch.Tensor) and values.dim() == 5 and "pixel_attention_mask" in pixels


def _pieces(value: Any) -> list[Any]:
    """What belongs to each row: TRL's lists as they are, and a tensor by its rows."""
    return list(value.split(1)) if isinstance(value, torch.Tensor) else value


def _of_one_size(pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors that are equal in all dimensions but the first, padded with zeros, as image processors pad a batch."""
    sizes = [max(piece.shape[dim] for piece in pieces) for dim in range(1, pieces[0].dim())]
    if all(list(piece.shape[1:]) == sizes for piece in pieces):
        return pieces
    missing = [[size - had for size, had in zip(sizes, piece.shape[1:], strict=True)] for piece in pieces]
    return [
        pad(piece, [part for size in reversed(lacks) for part in (0, size)])
        for piece, lacks in zip(pieces, missing, strict=True)
    ]
