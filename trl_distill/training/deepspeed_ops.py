"""DeepSpeed's compiled ops: built once, with a message, under a lock.

DeepSpeed compiles ops on first use, silently, for minutes, in every process. A build that is killed leaves a lock file
behind, and later runs wait for it forever. Here one process builds, under a lock that the system releases if the
process dies, and stale lock files are removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path


OWN = "trl_distill"


def extensions_folder() -> Path:
    """
    Where compiled ops go: a folder of our own, so that every lock in it is ours.

    It is under `TORCH_EXTENSIONS_DIR` if set, else in this Python environment, else in the user's cache folder.
    """
    root = Path(sys.prefix) if os.access(sys.prefix, os.W_OK) else Path.home() / ".cache"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or root / "torch_extensions")
    return folder if folder.name == OWN else folder / OWN


def build_ops() -> None:
    """
    Build the ops that this process needs under DeepSpeed, or wait while another process does; seconds if they exist.

    Call it before anything uses DeepSpeed. It does nothing unless `accelerate launch` started this process with
    DeepSpeed. The ops: shared-memory communication without a GPU, and CPU Adam if the optimizer is offloaded.

    Raises:
        RuntimeError: an op must be built, and there is no compiler.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return
    from deepspeed.accelerator import get_accelerator

    builders = []
    if get_accelerator().device_name() == "cpu":
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        builders.append(ShareMemCommBuilder())
    if os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") == "cpu":
        from deepspeed.ops.op_builder import CPUAdamBuilder

        builders.append(CPUAdamBuilder())
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # where ninja is
    with open(folder / "building.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for builder in builders:
            built = any(folder.rglob(f"{builder.name}.so"))
            if not built and shutil.which("g++") is None:
                raise RuntimeError(
                    f"DeepSpeed compiles {builder.name} on first use, but there is no `g++`. Install it."
                )
            if not built:
                print(f"Building DeepSpeed's {builder.name} into {folder} (once, 1 to 4 minutes) ...", flush=True)
            for left in folder.rglob(f"{builder.name}/lock"):  # left by a build that was killed
                left.unlink()
            with open(folder / f"{builder.name}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
                builder.load()
