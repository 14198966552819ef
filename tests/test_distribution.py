"""The package as people get it: wheel and sdist, in an environment that has nothing of this repository."""

from __future__ import annotations

import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import succeeds


ROOT = Path(__file__).parents[1]
TINY = (
    'output_dir="out", max_steps=1, per_device_train_batch_size=2, max_completion_length=4, '
    'use_cpu=True, bf16=False, report_to="none"'
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, built from a copy: building leaves files beside the sources."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = succeeds(["git", "ls-files"], cwd=ROOT).split()
    for name in files:
        if (ROOT / name).is_file() and name.startswith(("trl_distill/", "pyproject", "README", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel, build_sdist; build_wheel({0!r}); build_sdist({0!r})"
    succeeds([sys.executable, "-c", build.format(str(folder))], cwd=source)
    return folder


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_file_of_the_package(built):
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "trl_distill").rglob("*") if path.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        assert ours <= set(wheel.namelist())
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        assert ours <= {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}


@pytest.mark.slow
def test_the_ten_line_example_runs_from_an_empty_environment(built, saved, prompts, tmp_path):
    """The README's example, with tiny models in the place of those it names; from the wheel, then from the sdist."""
    succeeds([sys.executable, "-m", "venv", tmp_path / "empty"])
    python = tmp_path / "empty" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    (tmp_path / "example.py").write_text(example(saved))
    prompts.select_columns(["prompt"]).to_json(tmp_path / "prompts.jsonl")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    succeeds([*pip, "-c", ROOT / "constraints.txt", next(built.glob("*.whl"))])
    succeeds([python, "example.py"], cwd=tmp_path, env=env)
    (tmp_path / "out" / "model.safetensors").unlink()
    succeeds([*pip, "--no-deps", "--force-reinstall", next(built.glob("*.tar.gz"))])
    succeeds([python, "example.py"], cwd=tmp_path, env=env)
    assert (tmp_path / "out" / "model.safetensors").exists()


def example(saved: Path) -> str:
    text = re.search(r"<!-- run: tiny -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    for pattern, new in (
        (r"OPDConfig\([^\n]*\)", f"OPDConfig({TINY})"),
        (r"load_dataset\([^\n]*?\"train\"\)", 'load_dataset("json", data_files="prompts.jsonl", split="train")'),
        ("Qwen/Qwen3-0.6B", str(saved / "student")),
        ("Qwen/Qwen3-4B", str(saved / "teacher")),
    ):
        text, found = re.subn(pattern, lambda _, new=new: new, text, count=1)
        assert found == 1, pattern
    return text
