"""How good are saved models? Accuracy with intervals, KL to a teacher, length, diversity; several models side by side.

    python scripts/evaluate.py --models student out --teacher Qwen/Qwen3-4B --prompts test.jsonl \\
        --verifier my_module.is_correct --num_generations 8

The verifier is a reward function as the trainer takes it: a score for each completion, right from `--correct_from` on.
Without one, everything but accuracy is told. Answers end with the model's stop tokens, and with the teacher's where one
is given. Writes a JSON file with every number (each prompt's scores, too) and a table in Markdown beside it, after each
model. All intervals are bootstrapped over prompts.

Left out on purpose: public benchmarks, for which `lm-eval` is made (docs/recipes.md has its command), several devices.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other

import torch


if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed is installed, it would look for one and warn

from judging import Help, beyond, check_teacher, first_rows, load, stops_of, template_kwargs, tokenizer_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from trl_distill.data import import_reward
from trl_distill.evaluation import Answer, Estimate, answer_all, difference, summarise
from trl_distill.samples import Sampling


console = Console()
SHARES = ("avg@", "pass@", "truncated")  # told in percent, where the verifier says right or wrong


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--models", nargs="+", required=True, help="folders or names on the hub; the first one is compared with")
    add("--prompts", required=True, help='a .jsonl file, folder or name on the hub, with a "prompt" column')
    add("--split", default="train", help="of the prompts")
    add("--num_prompts", type=int, default=200, help="how many, from the first")
    add("--verifier", help="import path (`module.function`), or a name from trl.rewards")
    add("--correct_from", type=float, default=1.0, help="the score from which on an answer is right")
    add("--teacher", help="for the KL; to see how good it is itself, name it among the models")
    add("--num_generations", type=int, default=8, help="answers per prompt")
    add("--k", type=int, nargs="*", default=[], help="of pass@k; powers of two unless given")
    add("--max_completion_length", type=int, default=256, help="tokens")
    add("--temperature", type=float, default=1.0, help="of sampling, and of both models in the KL")
    add("--chat_template_kwargs", type=template_kwargs, help="as in training: '{\"enable_thinking\": false}'")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--batch_size", type=int, default=64, help="answers at a time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help="of all models; the checkpoint's own by default")
    add("--output", type=Path, default=Path("evaluation.json"))
    options = parser.parse_args(words)
    for name in ("num_prompts", "num_generations", "max_completion_length", "batch_size", "temperature"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} is {getattr(options, name)}; it must be more than 0")
    if any(not 1 <= k <= options.num_generations for k in options.k):
        parser.error(f"--k is {options.k}, but there are {options.num_generations} answers per prompt to tell it from")
    if options.output.suffix != ".json":
        parser.error(f"--output is {options.output}; name a .json file, the table goes beside it")
    return options


def evaluated(name: str, model: Any, teacher: Any, rows: list, options: argparse.Namespace, progress: Any) -> list:
    """All answers of one model."""
    tokenizer = tokenizer_of(name)
    models = [model, *([teacher] if teacher is not None else [])]
    stops, merged = stops_of(models, tokenizer)
    how = Sampling(
        options.max_completion_length,
        tuple(stops),
        options.temperature,
        options.num_generations,
        options.seed,
        suppressed=beyond(model, teacher) if teacher is not None else (),
    )
    verifiers = [import_reward(options.verifier)] if options.verifier else []
    bar = progress.add_task(name, total=len(rows) * options.num_generations)
    found: list[Answer] = []
    asked = (rows, tokenizer, how, verifiers, teacher, merged, options.batch_size)
    for batch in answer_all(model, *asked, template_kwargs=options.chat_template_kwargs):
        found += batch
        progress.advance(bar, len(batch))
    return found


def shown(name: str, estimate: Estimate, graded: bool) -> str:
    """'93.4% (91.2–95.1)'; a graded score is told as it is."""
    if name.startswith(SHARES) and not (graded and name.startswith("avg@")):
        return f"{estimate.value:.1%} ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"
    digits = 1 if name == "length" else 3
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}–{estimate.high:.{digits}f})"


def lines(results: dict[str, dict[str, Estimate]], graded: bool) -> list[list[str]]:
    """A row for each number, a column for each model; the heading first. Graded scores are no shares."""
    names = list(dict.fromkeys(name for estimates in results.values() for name in estimates))
    names = [name for name in names if not (graded and name.startswith("pass@") and " − " in name)]
    rows = [["", *results]]
    for name in names:
        found = [estimates.get(name) for estimates in results.values()]
        label = {"kl": "KL to the teacher, nats per token", "length": "length, tokens"}.get(name, name)
        rows.append([label, *("" if one is None else shown(name, one, graded) for one in found)])
    return rows


def told(one: Estimate) -> dict[str, float | None]:
    """For JSON, which has no word for what is no number."""
    return {key: value if math.isfinite(value) else None for key, value in one._asdict().items()}


class Results:
    """What is known so far; saved after each model, so that nothing is lost where a later one fails."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.answers: dict[str, list[Answer]] = {}
        self.seconds: dict[str, float] = {}

    def add(self, name: str, answers: list[Answer], seconds: float) -> None:
        self.answers[name], self.seconds[name] = answers, seconds
        self.save()

    @property
    def graded(self) -> bool:
        """Whether scores are more than right and wrong."""
        return any(one.score not in (None, 0.0, 1.0) for found in self.answers.values() for one in found)

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        found = {
            name: summarise(answers, self.options.k, self.options.correct_from)
            for name, answers in self.answers.items()
        }
        first, *others = self.answers
        for name in others if self.options.verifier else ():
            label = f"avg@{self.options.num_generations} − the first's"
            found[name][label] = difference(self.answers[name], self.answers[first])
        return found

    def save(self) -> Path:
        """Numbers as JSON, and the table as Markdown beside it; returns the table's path."""
        models = {}
        for name, estimates in self.estimates().items():
            scores: dict[int, list[float | None]] = {}
            for answer in self.answers[name]:
                scores.setdefault(answer.prompt, []).append(answer.score)
            models[name] = {
                "estimates": {key: told(one) for key, one in estimates.items()},
                "scores": list(scores.values()),
                "seconds": round(self.seconds[name], 1),
            }
        output: Path = self.options.output
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.options).items()}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"settings": settings, "models": models}, indent=1, allow_nan=False) + "\n")
        head, *rows = lines(self.estimates(), self.graded)
        rule = ["---", *["---:"] * (len(head) - 1)]
        path = output.with_suffix(".md")
        path.write_text("\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows]) + "\n")
        return path

    def table(self, prompts: int) -> Table:
        """For a terminal."""
        title = f"{prompts} prompts, {self.options.num_generations} answers each; 95 % intervals over prompts"
        made = Table(title=title)
        head, *body = lines(self.estimates(), self.graded)
        for label in head:
            made.add_column(label, justify="right" if label else "left", overflow="fold")
        for row in body:
            made.add_row(*row)
        return made


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    transformers_logging.disable_progress_bar()
    try:
        rows = first_rows(options.prompts, options.split, options.num_prompts)
        if options.verifier:
            import_reward(options.verifier)  # before anything long begins
    except ValueError as error:
        sys.exit(f"{error}")
    teacher = load(options.teacher, "teacher", options.dtype, options.device) if options.teacher else None
    results = Results(options)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        for name in dict.fromkeys(options.models):
            model = load(name, "model", options.dtype, options.device)
            if teacher is not None and name != options.teacher:
                check_teacher(tokenizer_of(name), options.teacher, teacher, model)
            begun = time.perf_counter()
            try:
                found = evaluated(name, model, teacher, rows, options, progress)
            except ValueError as error:
                sys.exit(f"{name} could not be evaluated. {error}")
            results.add(name, found, time.perf_counter() - begun)
            del model  # one at a time, beside the teacher
    console.print(results.table(len(rows)))
    path = results.save()
    console.print(f"Results are in {options.output}, the table in {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
