"""Prompts with images through the data engine: from wherever they stand in the input, to all who read them, and out."""

from __future__ import annotations

import base64
import json
import shutil
from io import BytesIO

import pytest
import torch
from chat_server import ChatServer
from datasets import Dataset, load_dataset
from helpers import make_model, make_tokenizer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer
from vision_models import picture, vision_pair
from vision_runs import rows as vision_rows

from trl_distill.data.images import prompt_of, tidy_row
from trl_distill.models.properties import placeholder_ids
from trl_distill.synthetic import pipeline
from trl_distill.synthetic.config import GenerateConfig
from trl_distill.synthetic.images import images_in, names_of
from trl_distill.synthetic.sources.base import Sampling
from trl_distill.synthetic.sources.local import TransformersSource


def pixels(image) -> bytes:
    return image.convert("RGB").tobytes()


def asked(text: str, *images) -> dict:
    return {"prompt": [{"role": "user", "content": text}], "images": list(images)}


@pytest.fixture
def seen(bench, monkeypatch):
    """A teacher that says which pixels it was shown; whether it could see them is not looked at."""
    monkeypatch.setattr(pipeline, "check_images", lambda config: None)

    def look(prompt, seed, model):
        return "I see " + " ".join(names_of(prompt)) + " here."

    return bench.teach(look)


FORMS = ("images", "image", "placeholders", "messages", "bytes", "paths")


def written(bench, form: str) -> str:
    """A dataset of three prompts, of which the second has no image; its name."""
    given = [("What is this?", [picture(1)]), ("Say something.", []), ("And this?", [picture(2, side=40)])]
    rows = [asked(text, *images) for text, images in given]
    if form in ("placeholders", "messages"):
        for row in rows:
            parts = [{"type": "image", "image": i} if form == "messages" else {"type": "image"} for i in row["images"]]
            row["prompt"][0]["content"] = [{"type": "text", "text": row["prompt"][0]["content"]}, *parts]
            if form == "messages":
                del row["images"]
    if form == "image":
        rows = [{"prompt": row["prompt"], "image": (row["images"] or [None])[0]} for row in rows]
    if form == "paths":
        for number, row in enumerate(rows):
            for image in row["images"]:
                image.save(bench.folder / f"{number}.png")
            row["images"] = [str(bench.folder / f"{number}.png")] * len(row["images"])
        bench.prompts(rows)
        return str(bench.folder / "prompts.jsonl")
    folder = bench.folder / "given"
    if form == "bytes":
        Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    else:
        Dataset.from_list(rows).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("form", FORMS)
def test_images_come_out_as_they_went_in(bench, seen, form):
    bench.run(dataset_name=written(bench, form))
    found = load_dataset(str(bench.out), split="train")
    assert [[pixels(image) for image in row["images"]] for row in found] == [
        [pixels(picture(1))],
        [],
        [pixels(picture(2, side=40))],
    ]
    last = form in ("placeholders", "messages")
    for row, text in zip(found, ("What is this?", "Say something.", "And this?"), strict=True):
        parts = [(part["type"], part.get("text")) for part in row["prompt"][0]["content"]]
        images = [("image", None)] * len(row["images"])
        assert parts == ([("text", text), *images] if last else [*images, ("text", text)])
        shown = prompt_of(tidy_row(row))
        assert len(images_in(shown)) == len(row["images"])
    shown = [images_in(prompt) for prompt in seen[0].asked]
    assert [[pixels(Image.open(path)) for path in of] for of in shown] == [
        [pixels(image) for image in row["images"]] for row in found
    ]


def test_bytes_of_photos_are_kept(bench, seen):
    file = BytesIO()
    picture(1, side=64).save(file, "jpeg", quality=60)
    rows = [{"prompt": [{"role": "user", "content": "?"}], "image": {"bytes": file.getvalue(), "path": None}}]
    Dataset.from_list(rows).save_to_disk(bench.folder / "given")
    bench.run(dataset_name=str(bench.folder / "given"))
    (row,) = bench.rows()
    assert row["images"][0]["bytes"] == file.getvalue()
    assert row["images"][0]["path"].endswith(".jpg")


def test_equal_words_about_other_images_are_no_duplicates(bench, monkeypatch):
    monkeypatch.setattr(pipeline, "check_images", lambda config: None)
    loaded = bench.teach(lambda prompt, seed, model: "It is the same picture as always, with many blocks of colour.")
    text = "Describe this picture in one sentence, and name its colours, from the left to the right."
    rows = [asked(text, picture(seed)) for seed in (1, 2, 1)] + [asked(text), asked(text, picture(1), picture(2))]
    Dataset.from_list(rows).save_to_disk(bench.folder / "given")
    counts = bench.run(dataset_name=str(bench.folder / "given"))
    stages = {stage["stage"]: stage for stage in counts["stages"]}
    assert stages["equal prompts"]["dropped"] == {"equal to an earlier prompt": 1}
    assert stages["duplicates"]["dropped"] == {}
    assert [len(images_in(prompt)) for prompt in loaded[0].asked] == [1, 1, 0, 2]
    files = {path.name for path in (bench.folder / "out.work" / "prompts" / "images").iterdir()}
    assert len(files) == 2


REWARD = """
def pictured(prompts, completions, images, **_):
    shown = [[part["image"] for m in prompt for part in m["content"] if part["type"] == "image"]
             if isinstance(prompt[0]["content"], list) else [] for prompt in prompts]
    assert shown == images
    return [float(len(of)) + sum(image.size[0] for image in of) / 100 for of in images]
"""


def test_verifiers_get_pictures(bench, seen, reward):
    reward(REWARD)
    bench.run(dataset_name=written(bench, "images"), reward_funcs=["my_verifier.pictured"])
    assert [row["score"] for row in bench.rows()] == [1.28, 0.0, 1.4]


def test_what_cannot_be_read_is_listed_and_the_rest_goes_on(bench, seen):
    (bench.folder / "torn.png").write_bytes(b"no picture")
    picture(1).save(bench.folder / "good.png")
    lines = [
        asked("good", str(bench.folder / "good.png")),
        asked("torn", str(bench.folder / "torn.png")),
        asked("far", "https://example.org/far.png"),
        {"prompt": "as text", "images": [str(bench.folder / "good.png")]},
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
            "images": [str(bench.folder / "good.png")],
        },
    ]
    bench.prompts(lines)
    counts = bench.run()
    assert counts["stages"][0]["dropped"] == {
        "image that cannot be read": 2,
        "images beside a prompt that is text": 1,
        "images that do not fit the messages": 1,
    }
    assert [skip["where"] for skip in bench.skipped()] == ["line 2", "line 3", "line 4", "line 5"]
    assert counts["rows"] == 1


def test_a_moved_work_folder_is_resumed(bench, seen):
    """Paths are made when prompts are read."""
    bench.run(dataset_name=written(bench, "images"))
    (bench.folder / "out.work").rename(bench.folder / "elsewhere.work")
    bench.out = bench.folder / "elsewhere"
    bench.run(dataset_name=str(bench.folder / "given"), output_dir=str(bench.out))
    assert len(seen) == 1  # nobody was asked again
    assert [len(row["images"]) for row in bench.rows()] == [1, 0, 1]


def test_pairs_keep_their_images(bench, reward, monkeypatch):
    monkeypatch.setattr(pipeline, "check_images", lambda config: None)
    reward("def long(completions, **_):\n    return [float(len(c[0]['content'])) for c in completions]\n")
    bench.teach(lambda prompt, seed, model: "words " * (1 + seed % 5) + str(seed))
    settings = {"reward_funcs": ["my_verifier.long"], "completions_per_prompt": 4, "pairs": True, "max_repetition": 1}
    bench.run(dataset_name=written(bench, "images"), near_duplicates=0, **settings)
    found = load_dataset(str(bench.out), split="train")
    assert [pixels(image) for image in found[0]["images"]] == [pixels(picture(1))]
    assert {"chosen", "rejected", "images"} <= set(found.column_names)


FAMILIES = ["idefics3", "gemma3", "llava"]


def save(folder, family: str, seed: int = 0) -> str:
    for part in vision_pair(family, seed):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_teacher_writes_what_its_model_would_alone(tmp_path, family):
    folder = save(tmp_path / "teacher", family)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    picture(1).save(tmp_path / "1.png")
    picture(2).save(tmp_path / "2.png")
    prompts = []
    for text, images in (("What?", [1]), ("Say something.", []), ("And these two?", [1, 2])):
        parts = [{"type": "image", "image": str(tmp_path / f"{i}.png")} for i in images]
        content = [*parts, {"type": "text", "text": text}] if images else text
        prompts.append([{"role": "user", "content": content}])
    source = TransformersSource(folder, Sampling(max_tokens=6, temperature=0.0), batch_size=3)
    never = sorted(placeholder_ids(model.config))
    for prompt, answer in zip(prompts, source.complete(prompts, 0), strict=True):
        parts = prompt[0]["content"]
        if isinstance(parts, str):
            prompt = [{"role": "user", "content": [{"type": "text", "text": parts}]}]
        inputs = processor.apply_chat_template(
            [prompt], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=never, eos_token_id=1)
        said = ids[0, inputs["input_ids"].shape[1] :].tolist()
        kept = said[: said.index(1)] if 1 in said else said
        assert answer[0].text == processor.tokenizer.decode(kept)
        assert answer[0].stop_reason == ("stop" if 1 in said else "length")


def test_an_image_token_is_never_written(tmp_path):
    folder = save(tmp_path / "teacher", "idefics3")
    source = TransformersSource(folder, Sampling(n=4, max_tokens=20))
    (token,) = placeholder_ids(source.model.config)
    head = source.model.lm_head
    with torch.no_grad():
        head.weight[token] = 50 * head.weight.sum(0).sign()
    (answer,) = source.complete([[{"role": "user", "content": "Say something."}]], 0)
    assert all("<image>" not in completion.text for completion in answer)


def test_an_endpoint_is_sent_data_uris(bench):
    with ChatServer(lambda content, seed: f"seen {seed}") as server:
        bench.run(
            dataset_name=written(bench, "images"), teacher_model_name_or_path=f"{server.url}#m", near_duplicates=0
        )
        contents = [body["messages"][0]["content"] for body in server.asked]
    assert "Say something." in contents
    shown = {}
    for url, text in (content for content in contents if content != "Say something."):
        kind, data = url["image_url"]["url"].split(";base64,")
        assert (url["type"], kind, text["type"]) == ("image_url", "data:image/png", "text")
        shown[text["text"]] = pixels(Image.open(BytesIO(base64.b64decode(data))))
    assert shown == {"What is this?": pixels(picture(1)), "And this?": pixels(picture(2, side=40))}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evolve": 1}, "`evolve` would rewrite prompts without seeing them"),
        ({"revise": "default"}, "`revise` would revise completions without"),
        ({"new_prompts": 3}, "`new_prompts` would write new prompts without"),
        ({"judge": "http://localhost:1/v1#m"}, "`judge` would judge completions without"),
        ({"difficulty_model": "someone"}, "`difficulty_model` would measure"),
        ({"human_data": "x.jsonl", "human_share": 0.1}, "`human_data` would mix in"),
        ({"teacher_model_name_or_path": "vllm:someone"}, "not given to the teacher 'someone' in vLLM"),
        ({"teacher_model_name_or_path": "blind"}, r"the teacher 'blind' \(qwen3\) is a text model"),
        ({"teacher_model_name_or_path": "bare"}, "the teacher 'bare' has no processor"),
    ],
)
def test_who_would_not_see_the_images_is_refused_before_anyone_is_asked(bench, monkeypatch, settings, message):
    monkeypatch.chdir(bench.folder)
    loaded = bench.teach(lambda *_: "words")
    monkeypatch.setattr(pipeline, "check_difficulty_model", lambda model: None)
    make_model().save_pretrained("blind")
    make_tokenizer().save_pretrained("blind")
    model, processor = vision_pair("idefics3")
    model.save_pretrained("bare")
    processor.tokenizer.save_pretrained("bare")
    with pytest.raises(ValueError, match=message):
        bench.run(dataset_name=written(bench, "images"), **settings)
    assert loaded == []


@pytest.fixture
def generated(bench, monkeypatch):
    """A dataset that a vision-language teacher has written, in the folder "out", and a student beside it."""
    monkeypatch.chdir(bench.folder)
    save("teacher", "idefics3", 1)
    save("student", "idefics3", 0)
    vision_rows().remove_columns("completion").save_to_disk("prompts")
    settings = {"teacher_model_name_or_path": "teacher", "max_completion_length": 5, "keep_truncated": True}
    pipeline.run_pipeline(
        GenerateConfig(dataset_name="prompts", output_dir="out", max_repetition=1, min_characters=0, **settings)
    )
    assert [len(row["images"]) for row in bench.rows()] == [1, 0, 2, 1]
    return bench.folder


def test_a_student_is_trained_on_what_was_generated(generated):
    from trl_distill.cli import train

    words = (
        "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name out --output_dir trained "
        "--max_steps 1 --per_device_train_batch_size 4 --max_completion_length 6 --use_cpu --bf16 false --lmbda 0 "
        "--gradient_checkpointing false --report_to none --save_strategy no --logging_steps 1"
    )
    train.main(*train.parsed(words.split()))
    log = json.loads((generated / "trained" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["distill/on_policy"] == 0
    assert log[0]["loss"] > 0


def test_trl_s_sft_reads_what_was_generated(generated):
    dataset, pixels_seen = load_dataset("out", split="train"), []
    model, processor = vision_pair("idefics3", 0)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            "sft",
            max_steps=1,
            per_device_train_batch_size=4,
            max_length=None,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=dataset,
        processing_class=processor,
    )
    step = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        pixels_seen.append(inputs["pixel_values"]) or step(model, inputs, *args, **kwargs)
    )
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))
    assert sum(bool(image.any()) for row in pixels_seen[0] for image in row) == 4


def test_images_reach_another_machine_with_the_prompts(bench, seen):
    """Through storage that both reach; the second machine has no images of its own."""
    storage = f"file://{bench.folder / 'shared'}"
    bench.run(dataset_name=written(bench, "images"), work_dir=storage)
    shutil.rmtree(bench.folder / "out.work")
    shutil.rmtree(bench.out)
    bench.run(dataset_name=str(bench.folder / "given"), work_dir=storage)
    assert len(seen) == 1
    assert [len(row["images"]) for row in bench.rows()] == [1, 0, 1]
