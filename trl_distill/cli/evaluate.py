"""How good are saved models? Accuracy with intervals, KL to a teacher, length, diversity; several models side by side.

    trl-distill evaluate --model_name_or_path student out --teacher_model_name_or_path Qwen/Qwen3-4B \\
        --dataset_name test.jsonl --reward_funcs my_module.is_correct --num_generations 8

`--reward_funcs` are the verifiers, reward functions as the trainer takes them: a score for each completion, the sum of
several, right from `--correct_from` on. Without one, everything except accuracy is reported. Answers end with the
model's stop tokens, and with the teacher's where one is given. Writes a JSON file with every number (each prompt's
scores, too) and a table in Markdown beside it, after each model. All intervals are bootstrapped over prompts.

`--judge` is a model that scores the answers: it is the verifier if there are no reward functions, and is reported
beside them otherwise. With `--judge_mode pairwise` it compares each model's answers with those of the first (or of
`--against`) in both orders: win rates, ties counting half, and length-controlled ones as in AlpacaEval 2.

Left out on purpose: public benchmarks, for which `lm-eval` is made (docs/recipes.md has its command), several devices.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from .. import foreign_text
from ..data.images import has_images
from ..data.rewards import import_reward
from ..data.sampling import Sampling
from ..models.properties import unwrap_adapter
from ..reporting.evaluation import Answer, answer_all
from ..reporting.evaluation_table import Results
from . import judging
from .arguments import TEMPERATURE, CommandParser, check_sampling, errors_without_traceback, finite, template_kwargs
from .images import readable_rows, reader_of
from .models import (
    check_fit,
    config_of,
    first_prompts,
    load,
    never_written,
    reading_of,
    stop_ids_of_all,
    tokenizer_of,
)


console = foreign_text.console()


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(command="evaluate", text=__doc__)
    add = parser.add_argument
    add("--model_name_or_path", nargs="+", required=True, help="one or several; the others are compared with the first")
    add(
        "--dataset_name",
        required=True,
        help='prompts: a .jsonl file, folder or name on the hub, with a "prompt" column',
    )
    add("--dataset_split", default="train", help="the prompts' split")
    add("--num_prompts", type=int, default=200, help="how many, from the first")
    add("--reward_funcs", nargs="+", default=[], help="verifiers: `module.function`, or names from trl.rewards")
    add("--correct_from", type=finite, default=1.0, help="the score from which on an answer is right")
    add("--teacher_model_name_or_path", help="for the KL; to see how good it is itself, name it among the models")
    add("--num_generations", type=int, help="answers per prompt: 8 unless given, or one greedy answer")
    add("--k", type=int, nargs="*", default=[], help="of pass@k; powers of two unless given")
    add("--max_completion_length", type=int, default=256, help="tokens")
    add("--temperature", type=finite, default=1.0, help=TEMPERATURE)
    add(
        "--cross_tokenizer",
        action="store_true",
        help="the teacher has another tokenizer: the KL is that between texts, see docs/objective.md",
    )
    add("--chat_template_kwargs", type=template_kwargs, help="as in training: '{\"enable_thinking\": false}'")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--batch_size", type=int, default=64, help="answers at a time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help="of all models; the checkpoint's own by default")
    add("--output", type=Path, default=Path("evaluation.json"))
    judging.add_arguments(parser)
    options = parser.parse_args(words)
    if said := judging.fault(options):
        parser.error(said)
    if options.num_generations is None:
        options.num_generations = 1 if options.temperature == 0 else 8
    check_sampling(parser, options)
    if any(not 1 <= k <= options.num_generations for k in options.k):
        parser.error(f"--k is {options.k}, but there are {options.num_generations} answers per prompt to tell it from")
    if options.output.suffix != ".json":
        parser.error(f"--output is {options.output}; name a .json file, the table goes beside it")
    return options


def evaluated(
    name: str, model: Any, teacher: Any, rows: list, options: argparse.Namespace, progress: Any, reading: Any = None
) -> list:
    """All answers of one model; `reading` if the teacher has another tokenizer."""
    tokenizer = tokenizer_of(name)
    if reading is not None:
        teacher = None  # it is asked by `reading`
    models = [model, *([teacher] if teacher is not None else [])]
    stops, merged = stop_ids_of_all(models, tokenizer)
    how = Sampling(
        options.max_completion_length,
        tuple(stops),
        options.temperature,
        options.num_generations,
        options.seed,
        suppressed=never_written(model, teacher),
    )
    check_prompts(name, [unwrap_adapter(one).config for one in models], rows, options)
    verifiers = [import_reward(path) for path in options.reward_funcs]
    bar = progress.add_task(name, total=len(rows) * options.num_generations)
    found: list[Answer] = []
    asked = (rows, tokenizer, how, verifiers, teacher, merged, options.batch_size)
    reader = reader_of(name, options.teacher_model_name_or_path, options.chat_template_kwargs)
    for batch in answer_all(model, *asked, reading=reading, reader=reader):
        found += batch
        progress.advance(bar, len(batch))
    return found


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that are asked about, after a check that all models see their images."""
    dataset = first_prompts(options.dataset_name, options.dataset_split, options.num_prompts)
    teacher = options.teacher_model_name_or_path
    rows = readable_rows(dataset, models_of(options), teacher, options.cross_tokenizer)
    if options.judge and any(map(has_images, rows)):
        raise ValueError(
            "The dataset has images, but `--judge` reads prompts and answers as text, so it would judge without them. "
            "Use `--reward_funcs`, which get the images, or leave the judge out."
        )
    return rows


def models_of(options: argparse.Namespace) -> list[str]:
    """All models that answer, each once."""
    return list(dict.fromkeys([*options.model_name_or_path, *filter(None, [options.against])]))


def compare_all(judge: judging.EvaluationJudge, results: Results, against: str) -> None:
    """Compare each model with one of them."""
    for name, answers in results.answers.items():
        if name != against:
            with errors_without_traceback():
                results.add_comparisons(name, against, *judge.compare(answers, results.answers[against]))


def check_prompts(name: str, configs: list[Any], rows: list, options: argparse.Namespace) -> None:
    """Raise `ValueError` if a prompt does not fit into a model, or into the teacher, whose configuration is second."""
    reader = reader_of(name, options.teacher_model_name_or_path, options.chat_template_kwargs)
    lengths = [(reader.prompt(row), options.max_completion_length) for row in rows]
    check_fit(rows, lengths, reader, {"model": configs[0]}, *configs[1:])


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    transformers_logging.disable_progress_bar()
    with errors_without_traceback():
        rows = rows_of(options)
        for path in options.reward_funcs:
            import_reward(path)  # before anything long begins
        for name in models_of(options):
            if (config := config_of(name)) is not None:
                check_prompts(name, [config], rows, options)
        judge = judging.EvaluationJudge(options, rows) if options.judge else None
    teacher_name = options.teacher_model_name_or_path
    teacher = load(teacher_name, "teacher", options.dtype, options.device) if teacher_name else None
    results = Results(options)
    columns = (foreign_text.description_column(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        for name in models_of(options):
            model = load(name, "model", options.dtype, options.device)
            reading = None
            if teacher is not None and name != teacher_name:
                reading = reading_of(tokenizer_of(name), teacher_name, teacher, model, options)
            begun = time.perf_counter()
            try:
                found = evaluated(name, model, teacher, rows, options, progress, reading)
            except ValueError as error:
                sys.exit(f"{name} could not be evaluated. {error}")
            del model  # one at a time, beside the teacher
            if judge is not None and not judge.compares:
                with errors_without_traceback():
                    found, results.unjudged[name] = judge.score(found)
            results.add(name, found, time.perf_counter() - begun)
        if judge is not None and judge.compares:
            compare_all(judge, results, options.against or options.model_name_or_path[0])
    console.print(results.table(len(rows)))
    path = results.save()
    console.print(f"Results are in {options.output}, the table in {path}", highlight=False, soft_wrap=True)


def run(words: list[str]) -> None:
    """The command."""
    main(words)
