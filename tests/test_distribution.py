"""The package as people get it: wheel and sdist, in an environment that has nothing of this repository."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import run, succeeds
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
TINY = (
    'output_dir="out", max_steps=1, per_device_train_batch_size=2, max_completion_length=4, '
    'use_cpu=True, bf16=False, report_to="none"'
)


MODELS = ROOT / "scripts" / "studies" / "tasks" / "models"
PROMPT = (
    '{{"prompt": [{{"role": "user", "content": '
    '"State the final answer to the following arithmetic problem: {0} + 1{0} ="}}]}}\n'
)
COMMAND = (
    "--dataset_name prompts.jsonl --max_steps 2 --per_device_train_batch_size 4 --max_completion_length 8 "
    "--learning_rate 1e-3 --use_cpu --bf16 false --report_to none --save_strategy no"
)
ONE_PROCESS = (
    "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\nnum_machines: 1\nnum_processes: 1\n"
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


def brought(requirements: list[str]) -> set[str]:
    """The names of all distributions that these requirements bring along, in the form that pip compares."""
    found, open_ = set(), [Requirement(words) for words in requirements]
    while open_:
        required = open_.pop()
        name = canonicalize_name(required.name)
        if name in found or not wanted(required):
            continue
        try:
            open_ += map(Requirement, importlib.metadata.requires(name) or ())
        except importlib.metadata.PackageNotFoundError:  # of another platform than its marker says
            continue
        found.add(name)
    return found


def wanted(required: Requirement) -> bool:
    return required.marker is None or required.marker.evaluate({"extra": ""})


def linked(names: set[str], folder: Path) -> Path:
    """
    A folder of packages that has nothing but these distributions of the running environment.

    Distributions that share a folder, as those of `nvidia` do, are linked one level below it.
    """
    found = [importlib.metadata.distribution(name) for name in names]
    files = [{file.parts for file in one.files or () if file.parts[0] not in ("..", "__pycache__")} for one in found]
    owners = Counter(top for parts in files for top in {part[0] for part in parts})
    for distribution, parts in zip(found, files, strict=True):
        for part in {part[: min(owners[part[0]], 2)] for part in parts}:
            link = folder.joinpath(*part)
            link.parent.mkdir(exist_ok=True)
            if not link.exists():
                link.symlink_to(distribution.locate_file(Path(*part)))
    return folder


IMPORTS = """
import importlib, json, pkgutil
import trl_distill

lacking = {}
for module in pkgutil.walk_packages(trl_distill.__path__, "trl_distill."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        lacking[module.name] = str(error)
print(json.dumps(lacking))
"""

# What modules say where the extra that they are for is missing; nothing imports them before it is needed.
OPTUNA = "Sweeps need Optuna: pip install 'trl_distill[sweeps]'."
FOR_AN_EXTRA = {"trl_distill.sweeps.runner": OPTUNA, "trl_distill.sweeps.space": OPTUNA}


def test_modules_import_only_what_the_package_requires(tmp_path):
    """What an extra brings is imported where it is used: an environment without it runs everything else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    path = os.pathsep.join([str(linked(brought(project["dependencies"]), tmp_path)), str(ROOT)])
    found = json.loads(succeeds([sys.executable, "-S", "-c", IMPORTS], cwd=tmp_path, env={**ENV, "PYTHONPATH": path}))
    assert found == FOR_AN_EXTRA


@pytest.fixture(scope="module")
def empty(built, tmp_path_factory) -> Path:
    """The programs of an environment that holds the wheel, what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("empty")
    succeeds([sys.executable, "-m", "venv", folder])
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    succeeds([*pip, "-c", ROOT / "constraints.txt", next(built.glob("*.whl"))])
    return folder / "bin"


ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


@pytest.mark.slow
def test_the_commands_run_from_an_empty_environment(empty, tmp_path):
    """Two steps with the demo's models, by the name of the command alone; then launched by accelerate, and checked."""
    (tmp_path / "prompts.jsonl").write_text("".join(map(PROMPT.format, range(32))))
    (tmp_path / "one.yaml").write_text(ONE_PROCESS)
    words = [*COMMAND.split(), "--model_name_or_path", MODELS / "student"]
    words += ["--teacher_model_name_or_path", MODELS / "teacher"]
    train, check = ([empty / "trl-distill", command, *words] for command in ("train", "check"))
    assert "Done after 2 steps" in succeeds([*train, "--output_dir", "out"], cwd=tmp_path, env=ENV)
    launched = [*train, "--output_dir", "launched", "--accelerate_config", "one.yaml"]
    assert "Done after 2 steps" in succeeds(launched, cwd=tmp_path, env=ENV)
    out, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "launched"))
    before = load_file(MODELS / "student" / "model.safetensors")
    assert all(torch.equal(out[name], again[name]) for name in out)
    assert any(not torch.equal(out[name], before[name]) for name in before)
    assert "0 errors" in succeeds([*check, "--output_dir", "checked"], cwd=tmp_path, env=ENV)
    assert not (tmp_path / "checked" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_shipped_configurations_are_found_in_an_empty_environment(empty, tmp_path):
    """DeepSpeed is not installed there, which accelerate says once it has read the configuration."""
    words = [empty / "trl-distill", "train", "--accelerate_config"]
    done = run([*words, "zero3"], cwd=tmp_path, env=ENV)
    assert done.returncode != 0
    assert "DeepSpeed is not installed" in done.stderr
    done = run([*words, "zero33"], cwd=tmp_path, env=ENV)
    assert done.returncode == 1
    assert "Did you mean 'zero3'?" in done.stderr


@pytest.mark.slow
def test_the_ten_line_example_runs_from_an_empty_environment(built, empty, saved, prompts, tmp_path):
    """The README's example, with tiny models in the place of those it names; from the wheel, then from the sdist."""
    python = empty / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    (tmp_path / "example.py").write_text(example(saved))
    prompts.select_columns(["prompt"]).to_json(tmp_path / "prompts.jsonl")
    succeeds([python, "example.py"], cwd=tmp_path, env=ENV)
    (tmp_path / "out" / "model.safetensors").unlink()
    succeeds([*pip, "--no-deps", "--force-reinstall", next(built.glob("*.tar.gz"))])
    succeeds([python, "example.py"], cwd=tmp_path, env=ENV)
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
