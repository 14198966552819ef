"""Instruction-following difficulty (IFD): how much a prompt helps a small model to predict its completion.

IFD = perplexity of the completion given its prompt / perplexity of the completion alone (Cherry LLM, arXiv 2308.12032;
with a small model: Superfiltering, arXiv 2402.00530). Both are means over the same tokens, those of the completion.
Unlike the papers' code, which leaves out the first token of the completion alone, it is counted on both sides where the
tokenizer has a BOS token, and on neither where it has none. Which rows stay is decided in `select.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...data.sampling import prompt_ids
from ...heads.few_ids import log_probs_of
from ...heads.lm_head import LMHead
from ...models.properties import backbone_of, context_of
from ..records import Answered, PromptAnswer, Refusal
from ..text import flat
from ..work_folder import WorkFolder, digest, read_lines
from .chunks import ChunkStage
from .ingest import Prompts


TOKENS = 16_384  # of one forward, padding included


PLAIN = (  # for messages where the model has no chat template; the papers' prompt, which is Alpaca's
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)


@dataclass(frozen=True)
class Difficulty:
    """
    Attributes:
        perplexity (`float`): of the completion given its prompt.
        perplexity_alone (`float`): of the completion alone.
    """

    perplexity: float
    perplexity_alone: float

    @property
    def ifd(self) -> float:
        """Below 1 where the prompt helps."""
        return self.perplexity / self.perplexity_alone


@dataclass(frozen=True)
class PromptDifficulties:
    """
    The difficulties of one teacher's completions of one prompt.

    Attributes:
        id (`int`): of the prompt.
        values (`list[Difficulty | Refusal]`): of each completion, or why there is none.
    """

    id: int
    values: list[Difficulty | Refusal]

    def as_dict(self) -> dict[str, Any]:
        """The difficulties as a line of JSON holds them."""
        return {"id": self.id, "values": [asdict(value) for value in self.values]}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> PromptDifficulties:
        return cls(found["id"], [Refusal(**v) if "kind" in v else Difficulty(**v) for v in found["values"]])


@dataclass(frozen=True)
class _Sequence:
    """Token ids of which those from `start` on are scored."""

    ids: list[int]
    start: int


class DifficultyModel:
    """
    A causal language model in this process, on the GPU if there is one, in the checkpoint's dtype.

    Args:
        model (`str`): name or folder. Its chat template renders messages; without one, Alpaca's prompt does.
        batch_size (`int`): sequences in one forward, and fewer where they are long.

    Raises:
        ValueError: it cannot be loaded, its head is quantised, or its logits are not its head's.
    """

    def __init__(self, model: str, batch_size: int = 16):
        self.batch_size = batch_size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        self.model = loaded.to(self.device).eval()
        self.head = LMHead(self.model)
        self.longest = context_of(self.model.config.get_text_config())
        self._check_head(model)

    def measure(self, rows: list[Answered]) -> list[Difficulty | Refusal]:
        """
        The difficulty of each row, or why it has none. A completion is scored up to the model's context length.

        Sequences of similar length go into one forward, so memory is bounded by `batch_size`, `TOKENS` and the longest
        row.
        """
        encoded = [self._encode(row) for row in rows]
        usable = [pair for pair in encoded if not isinstance(pair, Refusal)]
        losses = iter(self.mean_losses([sequence for pair in usable for sequence in pair]))
        return [pair if isinstance(pair, Refusal) else _difficulty(next(losses), next(losses)) for pair in encoded]

    @torch.no_grad()
    def mean_losses(self, sequences: list[_Sequence]) -> list[float]:
        """The mean negative log-probability of each sequence's scored tokens, in nats."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
        losses = [math.nan] * len(sequences)
        while order:
            batch = [order.pop()]  # the longest first: what does not fit shows at once
            most = min(self.batch_size, TOKENS // len(sequences[batch[0]].ids))
            batch += [order.pop() for _ in range(min(most - 1, len(order)))]
            for i, loss in zip(batch, self._batch([sequences[i] for i in batch]), strict=True):
                losses[i] = loss
        return losses

    def close(self) -> None:
        """Give back the model's memory."""
        del self.model, self.head
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _encode(self, row: Answered) -> tuple[_Sequence, _Sequence] | Refusal:
        """The completion after its prompt, and alone."""
        try:
            prompt = self._prompt_ids(row)
        except (TemplateError, ValueError) as error:
            return Refusal("chat template of the difficulty model refuses the prompt", str(error))
        completion = self.tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        if self.longest is not None:
            completion = completion[: max(self.longest - max(len(prompt), 1), 0)]
        bos = self.tokenizer.bos_token_id
        skipped = 0 if bos is not None else 1  # nothing predicts the first token of the completion alone
        if not prompt or len(completion) <= skipped:
            why = "the prompt has no token" if not prompt else "no token of the completion can be scored"
            return Refusal("no difficulty: too short, or prompt too long for the model", why)
        alone = [bos, *completion] if bos is not None else completion
        return _Sequence([*prompt, *completion], len(prompt) + skipped), _Sequence(alone, 1)

    def _prompt_ids(self, row: Answered) -> list[int]:
        if isinstance(row.prompt, str) or self.tokenizer.chat_template:
            return prompt_ids(self.tokenizer, row.prompt, tools=row.columns.get("tools"))
        return prompt_ids(self.tokenizer, PLAIN.format(flat(row.prompt)))

    def _batch(self, sequences: list[_Sequence]) -> list[float]:
        """As [`mean_losses`], in one forward. Padding is on the right, where causal models do not see it."""
        width = max(len(sequence.ids) for sequence in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.long)  # (B, T)
        attended, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, sequence in enumerate(sequences):
            length = len(sequence.ids)
            ids[i, :length], attended[i, :length] = torch.tensor(sequence.ids), 1
            scored[i, sequence.start : length] = True
        ids, attended, scored = ids.to(self.device), attended.to(self.device), scored.to(self.device)
        hidden = self._hidden(ids, attended)[:, :-1][scored[:, 1:]]  # (N, H), the states that predict scored tokens
        log_probs = self._log_probs(hidden, ids[scored])
        counts = scored.sum(1).tolist()
        return [-float(part.double().mean()) for part in log_probs.split(counts)]

    def _hidden(self, ids: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Last hidden states `(B, T, H)`."""
        return backbone_of(self.model)(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state

    def _log_probs(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Log-probability `(N,)` of each id, by an fp32 log-softmax in tiles, so that logits take little memory."""
        return log_probs_of(hidden, self.head, ids[:, None], self.head.vocab_size, 1.0)[0][:, 0]

    @torch.no_grad()
    def _check_head(self, name: str) -> None:
        """That the model does nothing between its head and its logits that the head does not say."""
        ids = torch.arange(8, device=self.device)[None] % self.head.vocab_size
        attended = torch.ones_like(ids)
        own = self.model(input_ids=ids, attention_mask=attended, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        ours = self._log_probs(self._hidden(ids, attended)[0, :-1], ids[0, 1:])
        if not torch.allclose(ours, own.gather(1, ids[0, 1:, None])[:, 0], atol=0.2):
            raise ValueError(
                f"The logits of the difficulty model {name!r} are not those of its LM head, so perplexities would be "
                "wrong. Name another model, such as a small Llama, Qwen or GPT-2."
            )


class DifficultyStage(ChunkStage[DifficultyModel]):
    """
    The difficulties of one teacher's completions.

    Args:
        work, prompts, load, folder, index, teacher: see [`ChunkStage`]; `load` gives the model, and `folder` belongs to
            it, see [`difficulty_folder`].
        answers (`Callable[[int], Iterator[PromptAnswer]]`, *optional*): the answers of a chunk by its number, in place
            of those in "completions", for a stage that rewrites them.
    """

    def __init__(
        self,
        work: WorkFolder,
        prompts: Prompts,
        load: Callable[[], DifficultyModel],
        folder: str,
        index: int,
        teacher: str,
        answers: Callable[[int], Iterator[PromptAnswer]] | None = None,
    ):
        super().__init__(work, prompts, load, folder, index, teacher)
        self.label = f"difficulty of {teacher}"
        self.answers = answers or self._completions

    def rows(self, worker: DifficultyModel, number: int) -> Iterator[dict[str, Any]]:
        rows = {row.id: row for row in self.prompts.chunk(number)}
        answers = list(self.answers(number))
        asked = [
            Answered(rows[answer.id].prompt, completion.text, rows[answer.id].columns)
            for answer in answers
            for completion in answer.completions
        ]
        values = iter(worker.measure(asked))
        for answer in answers:
            yield PromptDifficulties(answer.id, [next(values) for _ in answer.completions]).as_dict()

    def _completions(self, number: int) -> Iterator[PromptAnswer]:
        return map(PromptAnswer.from_dict, read_lines(self.work.chunk(self.work.completions, self.index, number)))


def difficulty_folder(model: str, *parts: str) -> str:
    """Where a model's difficulties are; `parts` name what else they depend on, such as a revision of completions."""
    return f"difficulty-{digest(model, *parts, size=6).hex()}"


def difficulty_columns(value: Difficulty | Refusal | None) -> dict[str, float | None]:
    """The columns of a row; `None` in all of them where the difficulty could not be measured."""
    if not isinstance(value, Difficulty):
        return {"ifd": None, "perplexity": None, "perplexity_alone": None}
    return {"ifd": value.ifd, "perplexity": value.perplexity, "perplexity_alone": value.perplexity_alone}


def check_difficulty_model(model: str | None) -> None:
    """
    Find out early, without loading weights, whether the model is there.

    Raises:
        ValueError: it is not.
    """
    if model is None:
        return
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The difficulty model {model!r} could not be found: {error} Name a folder with model and tokenizer, or a "
            "model on the hub."
        ) from None


def _difficulty(loss: float, alone: float) -> Difficulty | Refusal:
    """From mean losses in nats; e^709 is the largest number there is."""
    if not (math.isfinite(loss) and math.isfinite(alone)) or max(loss, alone) > 700:
        return Refusal("perplexity is not finite", f"mean losses are {loss} and {alone}; look at the model's weights")
    return Difficulty(math.exp(loss), math.exp(alone))
