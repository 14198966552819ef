"""However a run on two processes ends, both leave, with one message, the status that is promised, and a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import LONG, kill_all, started, wait_for, wait_until_gone

from trl_distill.training.checkpoints import last_complete


HERE = Path(__file__).parent
LEAVES = 240  # seconds in which all processes must leave once one has; a busy machine's


class Way(NamedTuple):
    statuses: tuple[int, ...]  # of the two processes; of one that others have ended, whatever it may be
    message: str
    checkpoint: int | None  # the step of the last complete one


ANY = -1
WAYS = {
    "finished": Way((0, 0), "Done after 4 steps. The model is in out", 4),
    "nan_on_one": Way((1, 1), "NaN or infinite on 1 of 2", 2),
    "full_disk_on_the_first": Way((1, 1), "The checkpoint of step 3 could not be written", 2),
    "full_disk_on_the_second": Way((1, 1), "The checkpoint of step 3 could not be written by process 1", 2),
    "teacher_away_for_one": Way((1, 1), "Nobody answers at http://teacher.", 2),
    "reward_raises_on_one": Way((1, 1), "KeyError: 'no such answer'", 2),
    "setup_fails_on_one": Way((1, 1), "This process cannot read the dataset.", None),
    "one_is_killed": Way((ANY, -signal.SIGKILL), "", 2),
}
STOPPED = "Everything so far is in"


@pytest.fixture
def folder(saved, prompts) -> Path:
    (saved / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts["prompt"]))
    return saved


def arguments_of(way: str, stack: ExitStack) -> list[str]:
    if way == "reward_raises_on_one":
        return ["--reward_funcs", "replaced", "--num_generations", "4"]
    if way == "teacher_away_for_one":
        from helpers import make_model
        from teacher_server import TeacherServer

        server = stack.enter_context(TeacherServer(make_model(seed=2, hidden_size=24)))
        return ["--teacher_server_urls", server.url, "--kl_estimator", "sampled"]
    return []


def launched(folder: Path, way: str, launcher: str, stack: ExitStack) -> list:
    """The launcher, or without one the two processes."""
    script = [HERE / "way_out.py", folder, way, *arguments_of(way, stack)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launcher == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
        all_env = [env]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        words = [sys.executable, *script]
        env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        all_env = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = []
    for number, own in enumerate(all_env):
        output = stack.enter_context((folder / f"output-{number}.txt").open("w"))
        processes.append(stack.enter_context(started(words, env=own, stdout=output, stderr=output)))
    return processes


def output_of(folder: Path, processes: list) -> str:
    return "".join((folder / f"output-{number}.txt").read_text() for number in range(len(processes)))


def wait_until_all_left(processes: list) -> list[int]:
    """From when the first process has ended; ids of those that are left after the limit."""
    limit = time.monotonic() + LONG
    while all(process.poll() is None for process in processes) and time.monotonic() < limit:
        time.sleep(0.1)
    return [pid for process in processes for pid in wait_until_gone(process, LEAVES)]


def last_step(folder: Path) -> int | None:
    found = last_complete(folder / "out")
    return int(found.rpartition("-")[2]) if found else None


@pytest.mark.parametrize("launcher", ["by hand", "torchrun"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_all_leave(folder, way, launcher):
    expected = WAYS[way]
    with ExitStack() as stack:
        processes = launched(folder, way, launcher, stack)
        assert not wait_until_all_left(processes), output_of(folder, processes)
        output = output_of(folder, processes)
        if launcher == "torchrun":
            assert processes[0].wait() == (0 if way == "finished" else 1), output
        else:
            for process, status in zip(processes, expected.statuses, strict=True):
                assert process.wait() == status or (status == ANY and process.returncode != 0), output
        assert output.count(expected.message) == 1 or not expected.message, output
        assert last_step(folder) == expected.checkpoint
        if expected.checkpoint is not None and way not in ("finished", "one_is_killed"):
            assert f"checkpoint-{expected.checkpoint}" in output  # whoever reads the message knows where to go on


@pytest.mark.parametrize("launcher", ["by hand", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.slow
def test_all_leave_when_they_are_told(folder, number, launcher):
    """Of torchrun's own status distributed.md says what it is: 1."""
    with ExitStack() as stack:
        processes = launched(folder, "held", launcher, stack)
        for rank in range(2):
            wait_for(folder / f"begun-{rank}", processes[min(rank, len(processes) - 1)])
        for process in processes[-1:]:  # one is enough
            process.send_signal(number)
        assert not wait_until_all_left(processes), output_of(folder, processes)
        output = output_of(folder, processes)
        statuses = [process.wait() for process in processes]
        assert statuses == ([1] if launcher == "torchrun" else [75, 75]), output
        assert output.count(STOPPED) == 1, output
        assert f"checkpoint-{last_step(folder)}" in output


def test_what_a_test_starts_does_not_outlive_it(tmp_path):
    """Not even what has a session of its own, as a launcher's workers have."""
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "pathlib.Path(sys.argv[1], 'pid').write_text(str(child.pid)); time.sleep(600)"
    )
    with started([sys.executable, "-c", code, tmp_path]) as process:
        wait_for(tmp_path / "pid", process)
        while not (child := (tmp_path / "pid").read_text()):
            pass
    assert process.returncode == -signal.SIGKILL
    assert not wait_until_gone(process, 60)
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    assert kill_all(process) == []
