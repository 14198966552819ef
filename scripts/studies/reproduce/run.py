"""Are the claims about distillation true? Each is tried with small models, over three seeds, by one command.

    python scripts/reproduce.py                   # all claims
    python scripts/reproduce.py gap mismatch      # these
    python scripts/reproduce.py --write_docs      # put what has been run into docs/results.md
    python scripts/reproduce.py --preset gpu      # larger models on GSM8K, from the hub
    python scripts/reproduce.py often-wrong --help    # the student above its teacher: models and options of its own

Every finished run leaves a file of its own; if interrupted, rerun the command to resume. Each run takes one core, so
`--jobs` should not exceed their number; on a GPU runs go one at a time. Claims and their arms are in `claims.py`,
presets in `presets.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scripts.studies.reproduce import report as report
from scripts.studies.reproduce.claims import CLAIMS
from scripts.studies.reproduce.models import be_quiet
from scripts.studies.reproduce.presets import PRESETS, RunContext
from scripts.studies.reproduce.records import RunRecord
from trl_distill import foreign_text


ROOT = Path(__file__).parents[3]


SEEDS = (0, 1, 2)


OFTEN_WRONG = "often-wrong"  # a claim whose teachers and starting points are others, so it has a runner of its own


console = foreign_text.console()


def path_of(folder: Path, claim: str, arm: str, seed: int) -> Path:
    """The file of a run; `arm` is the arm's name."""
    return folder / "runs" / claim.replace(" ", "-") / f"{arm}-{seed}.json"


def run(claim: str, arm: str, seed: int, folder: Path, size: float, preset: str = "cpu") -> None:
    """One run, in a process of its own; its file is there once it has ended."""
    be_quiet()
    begun = time.perf_counter()
    chosen = CLAIMS[claim].arms[arm]
    try:
        result = chosen.run(RunContext(folder, PRESETS[preset]), seed, size)
    except Exception as error:  # as plain text: not every error can be passed to the other process
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    record = RunRecord(claim, chosen.label, seed, size, result, round(time.perf_counter() - begun))
    record.save(path_of(folder, claim, arm, seed))


def is_done(path: Path, size: float) -> bool:
    return path.exists() and RunRecord.load(path).size == size


def prepare(claim: str, folder: Path, preset: str) -> None:
    be_quiet()
    make = CLAIMS[claim].prepare
    if make is not None:
        make(RunContext(folder, PRESETS[preset]))


def collected(folder: Path, claims: list[str], size: float, seeds: list[int]) -> dict[str, list[RunRecord]]:
    """The finished runs of each claim, in the order of its arms."""
    found: dict[str, list[RunRecord]] = {}
    for claim in claims:
        paths = [path_of(folder, claim, arm, seed) for arm in CLAIMS[claim].arms for seed in seeds]
        runs = [RunRecord.load(path) for path in paths if is_done(path, size)]
        if runs:
            found[claim] = runs
    return found


def workers(options: argparse.Namespace) -> ProcessPoolExecutor:
    """A process for each run. One pool for each claim: a process that is killed takes its pool with it."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=1)


def run_all(options: argparse.Namespace) -> list[str]:
    """Run everything that is not done yet; returns a line for each failure."""
    folder, failed = options.output_dir, []
    with workers(options) as pool:
        for claim in options.claims:
            pool.submit(prepare, claim, folder, options.preset).result()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for claim in options.claims:  # one after another: some use an earlier one's models
            tasks = [(arm, seed) for seed in options.seeds for arm in CLAIMS[claim].arms]
            todo = [task for task in tasks if not is_done(path_of(folder, claim, *task), options.size)]
            bar = progress.add_task(claim, total=len(tasks), completed=len(tasks) - len(todo))
            how = (folder, options.size, options.preset)
            with workers(options) as pool:
                futures: dict[Future, tuple] = {pool.submit(run, claim, *task, *how): task for task in todo}
                for future in as_completed(futures):
                    arm, seed = futures[future]
                    label = CLAIMS[claim].arms[arm].label
                    error = future.exception()
                    if error is not None:
                        failed.append(f"{claim}, {label}, seed {seed}: {error}")
                    progress.advance(bar)
                    if not console.is_terminal:  # where bars are drawn only at the end
                        console.print(f"{claim}, {label}, seed {seed}: {'failed' if error else 'done'}")
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
        known = ", ".join(map(repr, (*CLAIMS, OFTEN_WRONG)))
        parser.error(
            f"there are no claims {', '.join(unknown)}; choose from {known}, the last one as the first word and alone"
        )
    preset = PRESETS[options.preset]
    can_try = preset.claims or tuple(CLAIMS)
    beyond = sorted(set(options.claims) - set(can_try))
    if beyond:
        parser.error(f"--preset {options.preset} cannot try {', '.join(beyond)}; it can try {', '.join(can_try)}")
    if options.write_docs and not preset.small:
        parser.error("--write_docs fills the page of the small models; leave it out, or --preset")
    options.claims = options.claims or list(can_try)
    if options.jobs is None:
        options.jobs = (os.cpu_count() or 1) if preset.small else 1
    if options.output_dir is None:
        options.output_dir = Path("reproduce_output" if preset.small else f"reproduce_output_{options.preset}")
    if options.jobs < 1 or options.size <= 0:
        parser.error("--jobs must be 1 or more, and --size above 0")
    return options


def main(options: argparse.Namespace) -> int:
    """Run, show and save; 1 where a run failed."""
    failed: list[str] = []
    if PRESETS[options.preset].small:  # nothing comes from the hub, and nothing should wait for it
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
        console.print(f"Failed: {line}", style="red", highlight=False)
    where = ", and docs/results.md" if options.write_docs else ""
    console.print(f"Results are in {options.output_dir}: runs/ holds one file each, *.png the pictures{where}")
    return 1 if failed else 0


def script() -> int:
    """The command, with the arguments of the process."""
    if sys.argv[1:2] == [OFTEN_WRONG]:
        from scripts.studies.often_wrong.run import main as often_wrong

        return often_wrong(sys.argv[2:])
    return main(parse())
