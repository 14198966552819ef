"""Two processes over gloo train as one process does on the same global batch: DDP and DeepSpeed ZeRO-3."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_model
from safetensors.torch import load_file


pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ZERO3 = HERE.parents[1] / "deepspeed_configs" / "zero3_cpu.yaml"


def launch(folder: Path, launcher: list[str], processes: int, *options: str, **env: str) -> list[dict]:
    """What each process saw of a run on global batches of 8."""
    run = subprocess.run(
        [sys.executable, "-m", *launcher, str(HERE / "worker.py"), str(folder), str(8 // processes), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(processes)]


def torchrun(processes: int) -> list[str]:
    return ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def assert_same_run(results: list[dict], single: dict) -> None:
    for result in results:
        for ours, theirs in zip(result["steps"], single["steps"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def saved_weights(folder: Path) -> torch.Tensor:
    return torch.cat(
        [tensor.flatten() for _, tensor in sorted(load_file(folder / "out" / "model.safetensors").items())]
    )


@pytest.mark.parametrize("options", [("full",), ("full", "rewards"), ("full", "off_policy")], ids="-".join)
def test_ddp_equals_one_process(saved, options):
    (single,) = launch(saved, torchrun(1), 1, *options)
    expected = saved_weights(saved)
    both = launch(saved, torchrun(2), 2, *options)
    assert [(r["distributed_type"], r["processes"]) for r in both] == [("MULTI_CPU", 2)] * 2
    assert_same_run(both, single)
    if "rewards" in options:
        assert all(row["reward_std"] > 0 for row in single["steps"])
    if "off_policy" in options:
        assert [row["distill/on_policy"] for row in single["steps"]] == [0.0, 1.0, 0.0]
    torch.testing.assert_close(saved_weights(saved), expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="session")
def deepspeed_ops() -> dict[str, str]:
    """Environment in which DeepSpeed's communication op is built already, by one process and into a folder of ours."""
    pytest.importorskip("deepspeed")
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles an op on first use, and there is no g++")
    folder = Path(sys.prefix) / "torch_extensions"
    for lock in folder.rglob("lock"):
        lock.unlink()  # left behind by a build that was killed; later ones would wait for it in silence
    env = {"TORCH_EXTENSIONS_DIR": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    code = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, check=True, timeout=600, capture_output=True
    )
    return env


@pytest.mark.parametrize(
    ("tied", "options"), [("student", ("full",)), ("teacher", ("topk",)), ("student", ("full", "routed"))], ids=str
)
def test_zero3_equals_one_process(saved, tokenizer, deepspeed_ops, tied, options):
    """With "routed" no process has a row of both teachers, and yet each takes part in the forward of both."""
    for name, seed in (("student", 1), ("teacher", 2), ("second", 3)):
        make_model("tied" if name == tied else "untied", seed=seed).save_pretrained(saved / name)
        tokenizer.save_pretrained(saved / name)
    (single,) = launch(saved, torchrun(1), 1, *options)
    expected = saved_weights(saved)
    both = launch(saved, ["accelerate.commands.launch", "--config_file", str(ZERO3)], 2, *options, **deepspeed_ops)
    assert ("distill/reverse_kl/code" in single["steps"][0]) is ("routed" in options)
    assert [(r["distributed_type"], r["processes"], r["zero_stage"]) for r in both] == [("DEEPSPEED", 2, 3)] * 2
    for result in both:
        assert result["teacher_parameters"] == single["teacher_parameters"]
        assert result["teacher_parameters_held"] <= 0.51 * result["teacher_parameters"]
    assert_same_run(both, single)
    torch.testing.assert_close(saved_weights(saved), expected, rtol=1e-3, atol=1e-5)
