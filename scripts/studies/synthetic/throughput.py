"""How fast the data engine is: prompts per second, memory over the run, and how busy it keeps an endpoint.

    python -m scripts.studies.synthetic.throughput                    # 100,000 prompts, some minutes
    python -m scripts.studies.synthetic.throughput --prompts 5000 --out /tmp/throughput.json

Two runs against an endpoint on this machine (`loopback.py`, its own process): one that answers at once, and one that
takes 50 ms for each answer, at 64 requests at a time. The share of time that the second is busy is the time that
requests were under way at it, summed and divided by 64 times the seconds from the first request to the last answer, as
the endpoint itself saw it. Memory is the process's resident set, sampled while teachers are asked.

Left out on purpose: real models, and networks.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from trl_distill.synthetic import GenerateConfig, run_pipeline


ROOT = Path(__file__).resolve().parents[3]


OUT = ROOT / "docs" / "results" / "synthetic" / "throughput.json"


DELAY = 0.05  # seconds for an answer, in the second run


CONCURRENCY = 64


EVERY = 0.25  # seconds between two looks at the memory


MIB = 2**20


@contextmanager
def endpoint(delay: float) -> Iterator[str]:
    """A loopback endpoint in a process of its own; gives its URL."""
    command = [sys.executable, "-m", "scripts.studies.synthetic.loopback", "--delay", str(delay)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


class Memory:
    """The resident set of this process while a block runs, sampled."""

    def __enter__(self) -> Memory:
        self.samples: list[tuple[float, float]] = []  # seconds, MiB
        self._ended, self._start = threading.Event(), time.perf_counter()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(EVERY):
            self.samples.append((time.perf_counter() - self._start, process.memory_info().rss / MIB))

    def figures(self, begin: float, end: float) -> dict[str, float]:
        """The peak, and the growth between the second tenth and the last tenth of a time, in MiB."""
        found = [size for at, size in self.samples if begin <= at <= end]
        tenth = max(1, len(found) // 10)
        growth = statistics.median(found[-tenth:]) - statistics.median(found[tenth : 2 * tenth] or found[-tenth:])
        return {"peak_mib": round(max(found), 1), "growth_mib": round(growth, 1)}


def write_prompts(path: Path, count: int) -> None:
    """Chats of one message, each with words of its own."""
    with open(path, "w") as file:
        for i in range(count):
            text = f"What is {i} plus {i * 7919 % 100_003}, and why? Show the steps one by one."
            file.write(json.dumps({"prompt": [{"role": "user", "content": text}], "number": i}) + "\n")


def measured(prompts: int, delay: float) -> dict[str, Any]:
    """One run: its figures."""
    with tempfile.TemporaryDirectory() as name, endpoint(delay) as url, Memory() as memory:
        write_prompts(Path(name) / "prompts.jsonl", prompts)
        config = GenerateConfig(
            dataset_name=f"{name}/prompts.jsonl",
            output_dir=f"{name}/out",
            teacher_model_name_or_path=f"{url}#loopback",
            concurrency=CONCURRENCY,
            near_duplicates=0,  # of answers that are alike
            max_repetition=1,
        )
        start, cpu = time.perf_counter(), time.process_time()
        counts = run_pipeline(config, Console(file=io.StringIO()))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        assert counts["rows"] == prompts, f"{counts['rows']} rows of {prompts} prompts"
        seen = json.load(urllib.request.urlopen(f"{url}/stats"))
        assert seen["requests"] == prompts, f"{seen['requests']} requests for {prompts} prompts"
        files = sorted(Path(f"{name}/out.work/completions/0").iterdir(), key=lambda path: path.stat().st_mtime)
        begin = memory._start + time.time() - time.perf_counter()  # as the clock of files shows it
        asked = [files[0].stat().st_mtime - begin, files[-1].stat().st_mtime - begin]
        return {
            "delay_s": delay,
            "prompts": prompts,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "prompts_per_second": round(prompts / seconds, 1),
            "asking_seconds": round(seen["wall_s"], 1),
            "asked_per_second": round(prompts / seen["wall_s"], 1),
            "most_requests_at_once": seen["most"],
            "busy_share": round(seen["busy_s"] / (CONCURRENCY * seen["wall_s"]), 4),
            "memory": memory.figures(*asked),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000, help="Prompts in each run.")
    parser.add_argument("--out", type=Path, default=OUT, help="File of the figures.")
    given = parser.parse_args()
    machine: dict[str, Any] = {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}
    machine |= {"load_before": round(os.getloadavg()[0], 2), "memory_gib": psutil.virtual_memory().total // 2**30}
    found: dict[str, Any] = {"machine": machine, "concurrency": CONCURRENCY}
    for name, delay in (("at_once", 0.0), ("slow_answers", DELAY)):
        found[name] = measured(given.prompts, delay)
        print(name, json.dumps(found[name]), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
