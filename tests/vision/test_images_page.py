"""The first example of docs/images.md, run with tiny models in the place of those that it names."""

from __future__ import annotations

import re
from pathlib import Path

from vision_models import picture, vision_pair

import trl_distill


PAGE = Path(__file__).parents[2] / "docs" / "images.md"
TINY = {
    "max_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
}


def test_the_first_example_trains(tmp_path, monkeypatch):
    (text,) = re.findall(
        r"run by tests/vision/test_images_page.py -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")):
        assert f'"{name}"' in text
        text = text.replace(f'"{name}"', f'"model-{seed}"')
        for part in vision_pair("idefics3", seed):  # whose processor needs no torchvision
            part.save_pretrained(f"model-{seed}")
    Path("pictures").mkdir()
    for number in range(4):
        picture(number).save(f"pictures/{number}.png")
    config = trl_distill.OPDConfig
    monkeypatch.setattr(trl_distill, "OPDConfig", lambda **given: config(**{**given, **TINY}))
    space: dict = {}
    exec(compile(text, str(PAGE), "exec"), space)
    (loss,) = [log["loss"] for log in space["trainer"].state.log_history if "loss" in log]
    assert loss > 0
