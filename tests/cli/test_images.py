"""The commands with vision-language models by name: evaluate, report, check and train."""

from __future__ import annotations

import importlib
import json
import re

import pytest
import torch
from datasets import Dataset
from helpers import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from vision_models import vision_pair
from vision_runs import judged_alone, rows


FAMILIES = ["idefics3", "gemma3", "llava"]  # whose processors any process can load


def save(folder, family: str, seed: int, resolution: int = 16) -> None:
    for part in vision_pair(family, seed, resolution=resolution):
        part.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a saved student, a teacher with another processor, and prompts with images."""
    monkeypatch.chdir(tmp_path)
    save("student", "idefics3", 0)
    save("teacher", "idefics3", 1, resolution=32)
    rows().save_to_disk("prompts")
    return tmp_path


USUAL = "--dataset_name prompts --device cpu --max_completion_length 5"


def evaluate(*words: str) -> dict:
    importlib.import_module("trl_distill.cli.evaluate").main([*USUAL.split(), "--output", "found.json", *words])
    with open("found.json") as file:
        return json.load(file)


def report(*words: str) -> dict:
    both = "--model_name_or_path student --teacher_model_name_or_path teacher --output report.html"
    importlib.import_module("trl_distill.cli.report").main([*USUAL.split(), *both.split(), *words])
    with open("report.html") as file:
        return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', file.read(), re.S)[1])


@torch.no_grad()
def kl_alone(row, ids: list[int], student: str = "student") -> torch.Tensor:
    log_q, log_p = (
        judged_alone(
            AutoModelForImageTextToText.from_pretrained(name).eval(),
            AutoProcessor.from_pretrained(name),
            row,
            torch.tensor(ids),
        )
        for name in (student, "teacher")
    )
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def test_a_report_shows_pictures_and_the_kl_of_full_logits(folder):
    found = report("--num_generations", "2", "--batch_size", "3")
    assert [len(row["pictures"]) for row in found["rows"]] == [1, 1, 0, 0, 2, 2, 1, 1]
    assert len(found["pictures"]) == 4
    for number, row in enumerate(found["rows"]):
        expected = kl_alone(rows()[number // 2], row["ids"])
        torch.testing.assert_close(torch.tensor(row["views"][0]["kl"]), expected, rtol=1e-2, atol=1e-3)


def test_a_report_on_the_dataset_s_completions(folder):
    found = report("--completions", "dataset", "--max_completion_length", "20")
    assert ["".join(row["texts"]) for row in found["rows"]] == [
        f"{row['completion'][0]['content']}<|im_end|>" for row in rows()
    ]
    for given, row in zip(rows(), found["rows"], strict=True):
        torch.testing.assert_close(
            torch.tensor(row["views"][0]["kl"]), kl_alone(given, row["ids"]), rtol=1e-2, atol=1e-3
        )


VERIFIER = """
def pictured(prompts, completions, images, **_):
    parts = [[part["type"] for part in prompt[-1]["content"]] if of else [] for prompt, of in zip(prompts, images)]
    return [float(kinds.count("image") == len(of)) + len(of) for kinds, of in zip(parts, images)]
"""


def test_an_evaluation_gives_verifiers_the_images_and_knows_the_kl(folder, monkeypatch):
    (folder / "seeing_verifier.py").write_text(VERIFIER)
    words = "--model_name_or_path student teacher --teacher_model_name_or_path teacher --num_generations 2"
    found = evaluate(*words.split(), "--reward_funcs", "seeing_verifier.pictured")["models"]
    assert found["student"]["scores"] == [[2.0] * 2, [1.0] * 2, [3.0] * 2, [2.0] * 2]
    assert (
        found["student"]["estimates"]["kl"]["value"] > 0.01 > 1e-5 > abs(found["teacher"]["estimates"]["kl"]["value"])
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_by_name(folder, family):
    save("student", family, 0)
    found = evaluate("--model_name_or_path", "student", "--num_generations", "2")
    assert found["models"]["student"]["estimates"]["length"]["value"] > 0


def test_an_adapter_of_a_vision_language_model(folder):
    base = AutoModelForImageTextToText.from_pretrained("student")
    lora = LoraConfig(r=2, target_modules=r".*text_model.*q_proj", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained("adapter")
    AutoProcessor.from_pretrained("student").tokenizer.save_pretrained("adapter")  # the processor is its base's
    found = report("--model_name_or_path", "adapter", "--completions", "dataset", "--max_completion_length", "20")
    plain = report("--completions", "dataset", "--max_completion_length", "20")
    assert found["summaries"][0]["kl"] != plain["summaries"][0]["kl"]
    assert [len(row["pictures"]) for row in found["rows"]] == [1, 0, 2, 1]


def a_text_model(name: str) -> None:
    make_model(seed=1).save_pretrained(name)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(name)


def no_processor() -> None:
    model, processor = vision_pair("idefics3")
    model.save_pretrained("bare")
    processor.tokenizer.save_pretrained("bare")


def text_prompts() -> None:
    flat = [{**row, "prompt": row["prompt"][0]["content"]} for row in rows().remove_columns("completion")]
    Dataset.from_list(flat).save_to_disk("flat")


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        (
            lambda: a_text_model("blind"),
            "--model_name_or_path blind",
            r"images in the column 'images', but .* text mod",
        ),
        (
            lambda: a_text_model("blind"),
            "--model_name_or_path student --teacher_model_name_or_path blind",
            r"The dataset has images, but the teacher 'blind' \(qwen3\) is a text model",
        ),
        (no_processor, "--model_name_or_path bare", r"'bare' has no processor.*Save one beside it"),
        (text_prompts, "--model_name_or_path student --dataset_name flat", r"Row 0 .* its prompt is text.*messages"),
        (
            lambda: None,
            "--model_name_or_path student --judge http://localhost:1/v1#judge",
            r"`--judge` reads prompts and answers as text",
        ),
        (
            lambda: None,
            "--model_name_or_path student --teacher_model_name_or_path teacher --cross_tokenizer",
            r"has another tokenizer, and `cross_tokenizer` is not made for images",
        ),
    ],
)
def test_who_does_not_see_the_images_is_told_before_a_model_is_loaded(folder, monkeypatch, prepare, words, message):
    prepare()
    monkeypatch.setattr("trl_distill.cli.evaluate.load", pytest.fail)
    with pytest.raises(SystemExit, match=message):
        evaluate(*words.split())


def test_a_second_student_with_another_processor_is_refused(folder, monkeypatch):
    monkeypatch.setattr("trl_distill.cli.report.load", pytest.fail)
    with pytest.raises(SystemExit, match="`--compare_with teacher` processes images differently than the first"):
        report("--compare_with", "teacher")


@pytest.mark.parametrize("form", ["column", "messages"])
def test_images_that_a_jsonl_file_names_by_their_paths(folder, form):
    lines = []
    for number in (0, 3):
        path = f"{folder}/{number}.png"
        rows()[number]["images"][0].save(path)
        parts = [{"type": "text", "text": "What is it?"}, {"type": "image", "image": path}]
        content = parts if form == "messages" else "What is it?"
        lines.append({"prompt": [{"role": "user", "content": content}]})
        if form == "column":
            lines[-1]["image"] = path
    (folder / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report("--dataset_name", "some.jsonl")
    assert len(found["pictures"]) == 2
    assert [one[0].split(", ")[1] for row in found["rows"] for one in row["pictures"]] == ["0.png", "3.png"]
    words = ["[image]", "What is it?"] if form == "column" else ["What is it?", "[image]"]
    assert found["rows"][0]["prompt"] == f"user: {' '.join(words)}"


def test_a_student_that_would_write_image_tokens_is_kept_from_it(folder):
    """It could not be judged on them: there is no image for them."""
    student = AutoModelForImageTextToText.from_pretrained("student")
    token = student.config.image_token_id
    with torch.no_grad():
        student.lm_head.weight[token] = 0.0
        weights = student.lm_head.weight
        weights[token] = 3 * weights[torch.randint(len(weights), (8,), generator=torch.Generator().manual_seed(0))].sum(
            0
        )
    student.save_pretrained("student")
    found = report("--num_generations", "4")
    assert any(token in top[0] for row in found["rows"] for top in row["views"][0]["top"])
    assert all(token not in row["ids"] for row in found["rows"])


def train(*words: str) -> None:
    module = importlib.import_module("trl_distill.cli.train")
    usual = (
        "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name prompts --output_dir out "
        "--max_steps 1 --per_device_train_batch_size 4 --max_completion_length 6 --use_cpu --bf16 false "
        "--gradient_checkpointing false --report_to none --save_strategy no --learning_rate 0.01 --lmbda 0"
    )
    module.main(*module.parsed([*usual.split(), *words]))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_by_name_moves_the_vision_tower_too(folder, family):
    save("student", family, 0)
    save("teacher", family, 1)
    train()
    before, after = load_file("student/model.safetensors"), load_file("out/model.safetensors")
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("vision" in name for name in moved)
    assert any("vision" not in name for name in moved)
    AutoProcessor.from_pretrained("out")


def test_check_says_who_sees_the_images(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        train("--check_only")
    said = " ".join(capsys.readouterr().out.split())
    assert not ended.value.code, said
    assert "process images differently" in said
    a_text_model("blind")
    with pytest.raises(SystemExit) as ended:
        train("--check_only", "--model_name_or_path", "blind", "--teacher_model_name_or_path", "blind")
    assert ended.value.code == 1
    assert "has images in the column 'images', but the student" in " ".join(capsys.readouterr().out.split())
