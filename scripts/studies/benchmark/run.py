"""How fast, and how large, is an update? `OPDTrainer` beside TRL's `DistillationTrainer`, `GKDTrainer`, `GRPOTrainer`.

    python scripts/benchmark.py                          # two CPU cores, 15 minutes
    python scripts/benchmark.py --preset gpu             # one GPU: Qwen3-0.6B and 4B in shape, 2 k to 8 k tokens
    python scripts/benchmark.py --preset gpu --dry_run   # the same cells in miniature, on a CPU: a rehearsal

Random weights and rollouts, the same for all; contenders take turns within one run. A number is a ratio of medians,
ours by theirs, given only where both losses are what their objectives have on these rollouts. Every cell is also
compared with its floor, the matrix products that no trainer can avoid. Peak memory is measured apart from time, each
contender in a process of its own. Writes `benchmark.json` and a picture; `--write_docs` puts both into `docs/`.

Left out: quality, since losses are checked instead; several devices; vLLM; most combinations of settings.
"""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets.utils.logging import disable_progress_bar as quiet_datasets
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

from scripts.studies.benchmark import growth, slopes
from scripts.studies.benchmark import report as report
from scripts.studies.benchmark.cells import Cell, make_rollouts, preset
from scripts.studies.benchmark.clocks import count_processor_time
from scripts.studies.benchmark.contenders import CONTENDERS, Contender, TrainerParts, memory_of
from scripts.studies.benchmark.reference import floor_seconds, reference_losses
from scripts.studies.benchmark.results import CellResult, ContenderResult, Machine, Results
from trl_distill import foreign_text


warnings.filterwarnings("ignore", message="Unfeasible length constraints")  # the length is forced, on purpose


console = foreign_text.console()


ROOT = Path(__file__).parents[3]


OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Measuring:
    """
    How cells are measured.

    Attributes:
        repeats (`int`): timed turns of each contender, times the cell's own `turns`.
        threads (`int`): of PyTorch, in the processes that measure memory.
        device (`torch.device`): that contenders train on.
        pool (`ProcessPoolExecutor`, *optional*): measures memory on a CPU; without one it is left out.
        memory_of_gpu (`bool`): measure memory on a GPU, whose allocator counts it.
        generation (`bool`): also time steps with generation.
    """

    repeats: int
    threads: int
    device: torch.device
    pool: ProcessPoolExecutor | None = None
    memory_of_gpu: bool = False
    generation: bool = True


def measure(cell: Cell, how: Measuring, advance: Callable[[], object]) -> CellResult:
    """Everything that is measured of one cell; `advance` is called now and then, [`steps_of`] times in all."""
    rollouts = make_rollouts(cell)
    expected = reference_losses(cell, rollouts, how.device)
    found = {}
    for name in cell.contenders:
        kind = CONTENDERS[name]
        loss = expected.by_objective[kind.objective]
        found[name] = ContenderResult(kind.label, kind.is_ours, kind.objective, loss, expected.scale)
    result = CellResult(cell, rollouts.tokens, rollouts.completion_tokens, found)
    with tempfile.TemporaryDirectory() as folder:
        if cell.timed:
            parts = {
                name: TrainerParts(cell, rollouts, Path(folder) / str(i), how.device) for i, name in enumerate(found)
            }
            result.floor_s = take_turns(cell, parts, found, how, advance)
        for name in cell.contenders:
            if how.pool is None:
                break
            peak = how.pool.submit(memory_of, name, cell, folder, how.device.type, how.threads).result()
            if peak is None:
                found[name].failed = found[name].failed or OUT_OF_MEMORY
            else:
                found[name].loss, found[name].peak_mib = peak.loss, peak.mib
            advance()
    return result


def take_turns(
    cell: Cell,
    parts: dict[str, TrainerParts],
    found: dict[str, ContenderResult],
    how: Measuring,
    advance: Callable[[], object],
) -> list[float]:
    """
    Time the contenders of a cell one after another, several times; on a GPU also measure their peak memory.

    Args:
        cell ([`Cell`]): the shape.
        parts (`dict[str, TrainerParts]`): of each contender, by name.
        found (`dict[str, ContenderResult]`): is filled in.
        how ([`Measuring`]): rounds, device, and what is left out.
        advance (`Callable`): called after each turn.

    Returns:
        `list[float]`: seconds of the floor in each round.
    """
    contenders: dict[str, Contender] = {}
    floor, repeats = [], how.repeats * cell.turns
    for name, its_parts in parts.items():
        try:
            contender = Contender(name, its_parts)
            found[name].loss = contender.turn(0).loss  # not timed: it warms up
            contenders[name] = contender
        except torch.OutOfMemoryError:
            found[name].failed = OUT_OF_MEMORY
        advance()
    device, rollouts = next((p.device, p.rollouts) for p in parts.values())
    for seed in range(1, repeats + 1):
        for name, contender in contenders.items():
            found[name].update_s.append(contender.turn(seed).update)
            advance()
        if not cell.axis:
            floor.append(floor_seconds(cell, rollouts, device))
    for name, contender in contenders.items() if not cell.axis else ():
        if cell.generates and how.generation:
            if len(contenders) > 1:  # to be compared
                turn = contender.turn(repeats, generating=True)
                found[name].step_s, found[name].generation_s = [turn.update + turn.generation], turn.generation
            if contender.kind.is_ours:
                found[name].whole = contender.whole(repeats)
        if len(contenders) > 1 or not found[name].whole:  # which says more
            found[name].shares = contender.shares(repeats)
        if how.memory_of_gpu:
            found[name].peak_mib = contender.peak(repeats)
        advance()
    for contender in contenders.values():
        contender.close()
    return floor


def steps_of(cell: Cell, repeats: int, memory: bool) -> int:
    """How often a cell's bar advances."""
    rounds = memory + (1 + repeats * cell.turns + (not cell.axis)) * cell.timed
    return len(cell.contenders) * rounds


def memory_pool(wanted: bool) -> Any:
    """A process for each task, forked from one that has imported everything and computed nothing."""
    if not wanted:
        return nullcontext()
    context = multiprocessing.get_context("forkserver")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # the server imports before it knows ours
    # there, freed memory goes back at once, so that a peak is memory in use
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    context.set_forkserver_preload(["scripts.studies.benchmark.contenders"])
    return ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1, initializer=be_quiet)


def be_quiet() -> None:
    """Hide warnings that are expected here, and the progress of saving models."""
    quiet_datasets()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("trl", "trl_distill", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def no_results_yet(options: argparse.Namespace, device: torch.device) -> Results:
    """Machine, versions and command, as they stand above the tables; no cells."""
    names = Path("/proc/cpuinfo")
    processor = next(
        (line.split(":")[1].strip() for line in names.read_text().splitlines() if line.startswith("model name"))
        if names.exists()
        else iter(()),
        platform.processor() or platform.machine(),
    )
    shown = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores, no GPU"
    libraries = ("torch", "transformers", "trl", "accelerate", "peft", "trl_distill")
    return Results(
        preset=options.preset,
        dry_run=options.dry_run,
        machine=Machine(processor, shown, torch.get_num_threads()),
        versions={"Python": platform.python_version(), **{name: version(name) for name in libraries}},
        command=shlex.join(["python", "scripts/benchmark.py", *typed(sys.argv[1:])]),
        beside=options.beside,
    )


def typed(arguments: list[str]) -> list[str]:
    """The arguments that another would type: not where the files went, and not what ran beside."""
    kept = list(arguments)
    for name in ("--output_dir", "--beside"):
        if name in kept:
            place = kept.index(name)
            del kept[place : place + 2]
    return kept


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for."""
    cells = preset(options.preset, options.dry_run)
    if options.no_growth:
        cells = [cell for cell in cells if not cell.axis]
    if options.cells is None:
        return cells
    unknown = sorted(set(options.cells) - {cell.name for cell in cells})
    if unknown:
        raise ValueError(f"There are no cells {unknown}. Choose from {[cell.name for cell in cells]}.")
    return [cell for cell in cells if cell.name in options.cells]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["cpu", "real", "growth", "gpu"], default="cpu")
    parser.add_argument("--dry_run", action="store_true", help="all cells in miniature, on the CPU")
    parser.add_argument("--cells", nargs="+", help="only these, by name")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each contender")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--no_memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no_generation", action="store_true", help="do not time steps with generation")
    parser.add_argument("--no_growth", action="store_true", help="do not measure growth with size")
    parser.add_argument("--processor_time", action="store_true", help="of one thread, beside other programs")
    parser.add_argument("--beside", default="", help="what else runs on the machine: a sentence for the page")
    parser.add_argument("--tables_of", type=Path, help="measure nothing: show (and write) a benchmark.json")
    parser.add_argument("--write_docs", action="store_true", help="write the tables and the picture to docs/")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark_output"))
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> int:
    """Measure, show and save; 1 where a loss was not its objective's."""
    if options.tables_of:
        return tables(Results.load(options.tables_of), options.write_docs)
    if options.preset == "gpu" and not options.dry_run and not torch.cuda.is_available():
        sys.exit(
            "The GPU preset needs a GPU, and PyTorch sees none. Rehearse it with `--dry_run`, or use `--preset cpu`."
        )
    if options.repeats < 1:
        sys.exit(f"`--repeats` is {options.repeats}, and no median comes of that. Write 1 or more.")
    try:
        cells = chosen(options)
    except ValueError as error:
        sys.exit(f"{error}")
    if options.processor_time and (options.threads != 1 or options.preset == "gpu"):
        sys.exit("The processor's time is that of all threads together, and of no GPU. Add `--threads 1`.")
    if options.processor_time:
        count_processor_time()
    be_quiet()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.preset == "gpu" and not options.dry_run else "cpu")
    results = no_results_yet(options, device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    on_gpu = device.type == "cuda"
    with memory_pool(not options.no_memory and not on_gpu) as pool, Progress(*columns, console=console) as progress:
        memory_of_gpu = on_gpu and not options.no_memory
        how = Measuring(options.repeats, options.threads, device, pool, memory_of_gpu, not options.no_generation)
        for cell in cells:
            task = progress.add_task(cell.name, total=steps_of(cell, options.repeats, pool is not None))
            results.cells.append(measure(cell, how, functools.partial(progress.advance, task)))
            progress.update(task, completed=progress.tasks[task].total)
            results.save(options.output_dir)  # nothing is lost where a later cell fails
            if not console.is_terminal:  # where bars are drawn only at the end
                console.print(f"{cell.name}: done")
    draw(results, options.output_dir)
    status = tables(results, options.write_docs)
    console.print(f"Results are in {options.output_dir}: benchmark.json" + ", and docs/" * options.write_docs)
    return status


def draw(results: Results, folder: Path) -> None:
    """The pictures of growth, where it was measured."""
    if results.preset == "growth":
        slopes.draw(results, folder / "benchmark_slopes.png")
    elif any(found.cell.axis for found in results.cells):
        growth.draw(growth.curves_of(results), folder / "benchmark_growth.png")


def tables(results: Results, into_docs: bool) -> int:
    """Show the tables, and write them into the docs; 1 where a loss was not its objective's."""
    report.show(results, console)
    if into_docs:
        report.write_docs(results, ROOT / "docs" / "benchmarks.md")
        draw(results, ROOT / "docs" / "images")
    others = report.disagreeing(results)
    for line in others:
        console.print(line)
    return 1 if others else 0


def script() -> int:
    """The command, with the arguments of the process."""
    return main(parse())
