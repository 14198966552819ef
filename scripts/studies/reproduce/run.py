"""Are the claims about distillation true? Each is tried with small models, over three seeds, by one command.

    python scripts/reproduce.py                   # all claims
    python scripts/reproduce.py gap mismatch      # these
    python scripts/reproduce.py --write_docs      # put what has been run into docs/results.md
    python scripts/reproduce.py --preset gpu      # larger models on GSM8K, from the hub

Every finished run leaves a file of its own; stopped and called again, the script goes on. One run per core: `--jobs`
should not exceed them; on a GPU one at a time. Claims and their arms are in `reproduce_claims.py`, presets in
`reproduce_runs.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scripts.studies.reproduce import report as report
from scripts.studies.reproduce.claims import CLAIMS
from scripts.studies.reproduce.runs import PRESETS, RunContext, be_quiet


ROOT = Path(__file__).parents[3]


SEEDS = (0, 1, 2)


console = Console()


def path_of(folder: Path, claim: str, arm: str, seed: int) -> Path:
    name = "".join(c if c.isalnum() or c in "=." else "-" for c in arm)
    return folder / "runs" / claim.replace(" ", "-") / f"{name}-{seed}.json"


def run(claim: str, arm: str, seed: int, folder: Path, size: float, preset: str = "cpu") -> None:
    """One run, in a process of its own; its file is there once it has ended."""
    be_quiet()
    begun = time.perf_counter()
    try:
        result = CLAIMS[claim].arms[arm](RunContext(folder, PRESETS[preset]), seed, size)
    except Exception as error:  # as plain text: not every error survives the way to the other process
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    path = path_of(folder, claim, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    whole = {"claim": claim, "arm": arm, "seed": seed, "size": size, **result}
    part.write_text(json.dumps({**whole, "seconds": round(time.perf_counter() - begun)}) + "\n")
    part.replace(path)


def is_done(path: Path, size: float) -> bool:
    return path.exists() and json.loads(path.read_text())["size"] == size


def prepare(claim: str, folder: Path, preset: str) -> None:
    be_quiet()
    make = CLAIMS[claim].prepare
    if make is not None:
        make(RunContext(folder, PRESETS[preset]))


def collected(folder: Path, claims: list[str], size: float, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """What has been run of each claim, in the order of its arms."""
    found: dict[str, list[dict[str, Any]]] = {}
    for claim in claims:
        paths = [path_of(folder, claim, arm, seed) for arm in CLAIMS[claim].arms for seed in seeds]
        runs = [json.loads(path.read_text()) for path in paths if is_done(path, size)]
        if runs:
            found[claim] = runs
    return found


def workers(options: argparse.Namespace) -> ProcessPoolExecutor:
    """A process for each run. One pool for each claim: a process that is killed takes its pool with it."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=1)


def run_all(options: argparse.Namespace) -> list[str]:
    """Everything that has not been run; returns what failed."""
    folder, failed = options.output_dir, []
    with workers(options) as pool:
        for claim in options.claims:
            pool.submit(prepare, claim, folder, options.preset).result()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for claim in options.claims:  # one after another: some go on with an earlier one's models
            tasks = [(arm, seed) for seed in options.seeds for arm in CLAIMS[claim].arms]
            todo = [task for task in tasks if not is_done(path_of(folder, claim, *task), options.size)]
            bar = progress.add_task(claim, total=len(tasks), completed=len(tasks) - len(todo))
            how = (folder, options.size, options.preset)
            with workers(options) as pool:
                futures: dict[Future, tuple] = {pool.submit(run, claim, *task, *how): task for task in todo}
                for future in as_completed(futures):
                    arm, seed = futures[future]
                    error = future.exception()
                    if error is not None:
                        failed.append(f"{claim}, {arm}, seed {seed}: {error}")
                    progress.advance(bar)
                    if not console.is_terminal:  # where bars are drawn only at the end
                        console.print(f"{claim}, {arm}, seed {seed}: {'failed' if error else 'done'}")
    return failed


def machine() -> dict[str, str]:
    return {
        "cores": str(os.cpu_count()),
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "trl_distill")},
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help=f"by name; all unless given: {', '.join(CLAIMS)}")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="small models, or larger ones on a GPU")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, help="runs at a time; one per core, or one on a GPU, unless given")
    parser.add_argument("--size", type=float, default=1.0, help="of every run; below 1 it is a rehearsal")
    parser.add_argument("--output_dir", type=Path, help="reproduce_output, or reproduce_output_gpu, unless given")
    parser.add_argument("--report_only", action="store_true", help="run nothing; show what has been run")
    parser.add_argument("--write_docs", action="store_true", help="write tables, pictures and numbers to docs/")
    options = parser.parse_args(words)
    unknown = sorted(set(options.claims) - set(CLAIMS))
    if unknown:
        parser.error(f"there are no claims {', '.join(unknown)}; choose from {', '.join(map(repr, CLAIMS))}")
    small, can_try = options.preset == "cpu", PRESETS[options.preset].claims or tuple(CLAIMS)
    beyond = sorted(set(options.claims) - set(can_try))
    if beyond:
        parser.error(f"--preset {options.preset} cannot try {', '.join(beyond)}; it can try {', '.join(can_try)}")
    if options.write_docs and not small:
        parser.error("--write_docs fills the page of the small models; leave it out, or --preset")
    options.claims = options.claims or list(can_try)
    options.jobs = options.jobs if options.jobs is not None else (os.cpu_count() or 1) if small else 1
    options.output_dir = options.output_dir or Path("reproduce_output" + ("" if small else f"_{options.preset}"))
    if options.jobs < 1 or options.size <= 0:
        parser.error("--jobs must be 1 or more, and --size above 0")
    return options


def main(options: argparse.Namespace) -> int:
    """Run, show and save; 1 where a run failed."""
    failed: list[str] = []
    if options.preset == "cpu":  # nothing comes from the hub, and nothing should wait for it
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    elif not options.report_only and not torch.cuda.is_available():
        console.print(f"--preset {options.preset} needs a GPU, and there is none here; leave it out for small models.")
        return 1
    if not options.report_only:
        failed = run_all(options)
    results = collected(options.output_dir, options.claims, options.size, options.seeds)
    for claim, runs in results.items():
        console.print(report.table(claim, CLAIMS[claim].sentence, runs))
        figure = report.figure(claim, runs)
        if figure is not None:
            figure.savefig(options.output_dir / f"{claim.replace(' ', '-')}.png")
    if options.write_docs:
        report.write_docs(results, {name: CLAIMS[name].sentence for name in results}, machine(), ROOT / "docs")
    for line in failed:
        console.print(f"[red]Failed:[/] {line}", highlight=False)
    where = ", and docs/results.md" if options.write_docs else ""
    console.print(f"Results are in {options.output_dir}: runs/ holds one file each, *.png the pictures{where}")
    return 1 if failed else 0


def script() -> int:
    """The script, with the arguments of the process."""
    return main(parse())
