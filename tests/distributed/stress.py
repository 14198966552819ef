"""Runs on two processes that must all leave, again and again, while a busy loop turns on every core.

    make test-stress                                  # or: python tests/distributed/stress.py --runs 20 --ways 3

Prints how often each ended as it should; status 1 where one did not. Part of no other target: it takes an hour.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from processes import run, started
from rich.console import Console
from rich.table import Table


TRAINING = HERE / "test_engines.py::test_two_processes_equal_one[ddp-full]"
WAYS_OUT = HERE / "test_ways_out.py"
LIMIT = 2400  # seconds for one call of pytest


def outcomes(target: Path, workers: int) -> list[tuple[str, bool]]:
    """Each test of a target, and whether it passed; several tests at a time with more than one worker."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        words = [sys.executable, "-m", "pytest", str(target), "--timeout", "1200", f"--junitxml={report}"]
        words += ["-n", str(workers)] if workers > 1 else []
        try:
            done = run(words, limit=LIMIT, cwd=HERE.parents[1], env={**os.environ, "HF_HUB_OFFLINE": "1"})
        except TimeoutError as error:
            print(error)
            return [(f"{target.name}, which hung", False)]
        if done.returncode:
            print(done.stdout[-6000:])
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
        found = [(case.get("name", ""), case.find("failure") is None and case.find("error") is None) for case in cases]
    return found or [(target.name, False)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of training on two processes beside one")
    parser.add_argument("--ways", type=int, default=3, help="of each way out")
    options = parser.parse_args()
    passed: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    console, start = Console(width=None if sys.stdout.isatty() else 120), time.monotonic()
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            stack.enter_context(started([sys.executable, "-c", "while True: pass"]))
        targets = [(TRAINING, 1)] * options.runs + [(WAYS_OUT, 2)] * options.ways
        for number, (target, workers) in enumerate(targets, start=1):
            for name, ended_well in outcomes(target, workers):
                tried[name] += 1
                passed[name] += ended_well
            so_far = f"{sum(passed.values())} of {sum(tried.values())} ended as they should"
            console.print(f"{number}/{options.runs + options.ways}: {so_far}, {time.monotonic() - start:.0f} s")
    table = Table("run", "ended as it should")
    for name in tried:
        table.add_row(name.replace("[", r"\["), f"{passed[name]} of {tried[name]}")
    console.print(table)
    return int(passed != tried)


if __name__ == "__main__":
    sys.exit(main())
