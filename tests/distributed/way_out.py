"""One of two processes that run `scripts/opd.py` and leave in the way that is asked for.

    RANK=0 WORLD_SIZE=2 ... python tests/distributed/way_out.py FOLDER WAY [ARGUMENT OF opd.py ...]

FOLDER holds `student`, `teacher`, `prompts.jsonl`; checkpoints after each step go to `FOLDER/out`. A process that has
made its first step writes `FOLDER/begun-RANK`. WAYs are the functions below; the faults happen in the third step.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

import trl_distill
from trl_distill.cli import train as opd
from trl_distill.teachers.server import ServedTeacher


RANK = int(os.environ["RANK"])
BAD_STEP = 2  # optimizer steps that are made before it
WAYS = {}


def way(function):
    WAYS[function.__name__] = function
    return function


def replace(owner: type, name: str, when, what) -> None:
    """Do `what` in a method, where `when` says so of its object, before the method itself."""
    original = getattr(owner, name)

    def replaced(self, *args, **kwargs):
        if when(self):
            what()
        return original(self, *args, **kwargs)

    setattr(owner, name, replaced)


def at_bad_step(trainer) -> bool:
    return trainer.state.global_step == BAD_STEP


def raises(error: Exception):
    def act():
        raise error

    return act


@way
def finished() -> None:
    """Nothing happens."""


@way
def held() -> None:
    """The run waits in its steps for a signal."""


@way
def nan_on_one() -> None:
    original = trl_distill.OPDTrainer.rollout_loss

    def loss(self, *args):
        found = original(self, *args)
        return found * float("nan") if RANK == 1 and at_bad_step(self) else found

    trl_distill.OPDTrainer.rollout_loss = loss


def full_disk(rank: int) -> None:
    original = torch.save

    def save(content, path, *args, **kwargs):
        if rank == RANK and "checkpoint-3" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(content, path, *args, **kwargs)

    torch.save = save


@way
def full_disk_on_the_first() -> None:
    full_disk(0)


@way
def full_disk_on_the_second() -> None:
    full_disk(1)


@way
def teacher_away_for_one() -> None:
    """Of a served teacher; whoever calls names the server."""

    class Away(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if RANK == 1 and state.global_step == BAD_STEP:
                ServedTeacher.score = raises_teacher_away

    def raises_teacher_away(self, rollouts):
        raise trl_distill.TeacherUnavailable("Nobody answers at http://teacher.")

    replace_callbacks(Away)


def replace_callbacks(kind: type[TrainerCallback]) -> None:
    original = trl_distill.OPDTrainer.__init__

    def with_callback(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(kind())

    trl_distill.OPDTrainer.__init__ = with_callback


@way
def reward_raises_on_one() -> None:

    calls = iter(range(100))

    def reward(completions, **_):
        if RANK == 1 and next(calls) == BAD_STEP:
            raise KeyError("no such answer")
        return [float(len(text)) for text in completions]

    opd.import_reward = lambda path: reward


@way
def setup_fails_on_one() -> None:
    original = trl_distill.OPDTrainer.__init__

    def init(self, *args, **kwargs):
        if RANK == 1:
            raise ValueError("This process cannot read the dataset.")
        original(self, *args, **kwargs)

    trl_distill.OPDTrainer.__init__ = init


@way
def one_is_killed() -> None:
    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if RANK == 1 and state.global_step == BAD_STEP:
                os.kill(os.getpid(), signal.SIGKILL)

    replace_callbacks(Kill)


class Say(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        Path(FOLDER, f"begun-{RANK}").touch()


if __name__ == "__main__":
    FOLDER, name, *further = sys.argv[1:]
    os.chdir(FOLDER)
    torch.set_num_threads(1)
    WAYS[name]()
    replace_callbacks(Say)
    arguments = (
        "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name prompts.jsonl --use_cpu "
        "--ddp_backend gloo --per_device_train_batch_size 4 --max_completion_length 6 --bf16 false --report_to none "
        "--gradient_checkpointing false --learning_rate 0.01 --save_strategy steps --save_steps 1 --output_dir out "
        f"--disable_tqdm true --logging_strategy no --max_steps {100000 if name == 'held' else 4}"
    )
    opd.main(*opd.parsed([*arguments.split(), *further]))
