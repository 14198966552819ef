"""Images where datasets have them: columns, messages, the teacher's own prompt, the dataset's completions."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import make_model, make_tokenizer
from vision_models import FAMILIES, picture, vision_model, vision_pair
from vision_runs import compare, config, judged_alone, make, rows

from trl_distill import OPDTrainer
from trl_distill.data.completions import completion_batch
from trl_distill.data.images import encode, prompt_of, shows_images, tidy_row
from trl_distill.data.rows import RowError, check_row
from trl_distill.data.sampling import Sampling, dataset_completion
from trl_distill.images import EncodedPrompt, Images, columns_of, keys_of
from trl_distill.training.reward_baseline import prompt_keys


def text_of(row):
    return row["prompt"][0]["content"]


def in_messages(dataset):
    """The same rows with their images in the messages; Arrow adds empty fields to their parts."""
    found = []
    for row in dataset:
        parts = [
            *({"type": "image", "image": image} for image in row["images"]),
            {"type": "text", "text": text_of(row)},
        ]
        found.append({"prompt": [{"role": "user", "content": parts}]})
    return Dataset.from_list(found)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "gemma3", "llava"])
@pytest.mark.parametrize("form", ["messages", "placeholders", "one image", "stream"])
def test_images_are_taken_from_columns_and_from_messages(tmp_path, family, form):
    dataset = rows((1, 1, 1, 1) if form == "one image" else (1, 0, 2, 1))
    given = dataset
    if form == "messages":
        given = in_messages(dataset)
    if form == "placeholders":
        parts = [
            [{"type": "image", "text": ""}] * len(row["images"]) + [{"type": "text", "text": text_of(row)}]
            for row in dataset
        ]
        changed = [[{"role": "user", "content": content}] for content in parts]
        given = dataset.remove_columns("prompt").add_column("prompt", changed)
    if form == "one image":
        given = Dataset.from_list([{"prompt": row["prompt"], "image": row["images"][0]} for row in dataset])
    if form == "stream":
        given = dataset.to_iterable_dataset()
        assert isinstance(given, IterableDataset)
    trainer = make(tmp_path, family, given)
    student, processor = vision_pair(family, seed=0)
    trainer.train_dataset = list(trainer.train_dataset)
    plain = [{**row, "prompt": [{"role": "user", "content": text_of(row)}]} for row in dataset]
    trainer.model.eval()
    batch = trainer._prepare_inputs(trainer.train_dataset)
    expected = make(tmp_path, family, dataset)
    expected.model.eval()
    torch.manual_seed(0)
    assert torch.equal(batch["prompt_ids"], expected._prepare_inputs(list(dataset))["prompt_ids"])
    compare_rows(trainer, student, processor, plain)


def compare_rows(trainer, student, processor, plain):
    dataset = trainer.train_dataset
    trainer._prepare_inputs, prepare = lambda _: prepare(dataset), trainer._prepare_inputs
    compare(trainer, plain, student, vision_model(_family(student), seed=1), processor)


def _family(model):
    return model.config.model_type


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dataset_completion_has_the_prompt_of_a_rollout(tmp_path, family):
    dataset = rows()
    trainer = make(tmp_path, family, dataset)
    trainer.model.eval()
    rolled = trainer._prepare_inputs(list(dataset))
    stops, tokenizer = trainer.eos_token_ids, trainer.tokenizer
    batch = completion_batch(list(dataset), 0, 1, tokenizer, stops, 8, processor=trainer.processor)
    assert torch.equal(batch["prompt_ids"], rolled["prompt_ids"])
    ours, theirs = Images.from_inputs(batch), Images.from_inputs(rolled)
    assert [sorted(row) for row in ours.rows] == [sorted(row) for row in theirs.rows]
    for mine, other in zip(ours.rows, theirs.rows, strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(value, other[name][:, : value.shape[1]] if value.dim() == 5 else other[name])
    texts = tokenizer.batch_decode([ids[mask.bool()] for ids, mask in zip(*completions(batch), strict=True)])
    assert texts == ["It i", "It is", "It is ", "It is r"] or texts == [text + "<|im_end|>" for text in SAID]


SAID = ("It i", "It is", "It is ", "It is r")


def completions(batch):
    return batch["completion_ids"], batch["completion_mask"]


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_for_trl_hold_the_same_images(family):
    _, processor = vision_pair(family)
    prompts = encode(processor, [prompt_of(tidy_row(row)) for row in rows()])
    length = max(len(prompt.ids) for prompt in prompts)
    batch = {"prompt_ids": torch.zeros(len(prompts), length), **columns_of(prompts, length, 3)}
    direct, back = Images.of_prompts(prompts, length, 3, "cpu"), Images.from_inputs(batch)
    assert direct.arguments.keys() == back.arguments.keys()
    for name, value in direct.arguments.items():
        assert back.arguments[name].shape[1:] == value.shape[1:]
        assert torch.equal(back.arguments[name].flatten().float(), value.flatten().float())
    some = torch.tensor([False, True, True, False])
    assert len(direct.of_rows(some).rows) == 2
    assert direct.of_rows(some).rows[0] == {}


def test_equal_prompts_are_encoded_once(monkeypatch):
    _, processor = vision_pair("gemma3")
    calls, original = [], type(processor).apply_chat_template
    monkeypatch.setattr(
        type(processor), "apply_chat_template", lambda self, *a, **kw: (calls.append(1), original(self, *a, **kw))[1]
    )
    row = rows()[0]
    again = rows()[0]
    other = {**row, "images": [picture(5, side=20)]}
    found = encode(processor, [prompt_of(one) for one in (row, again, other)])
    assert len(calls) == 2
    assert found[0] is found[1]
    assert not torch.equal(found[0].pixels["pixel_values"], found[2].pixels["pixel_values"])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "gemma3"])
def test_the_teachers_own_prompt_has_the_rows_images(tmp_path, family):
    """It is read before the same completion, with its own text and the images of the row, or with its own images."""
    dataset = rows()
    own = [{"role": "user", "content": "Look well, and then say what it is."}]
    shown = picture(77, side=28)
    named = [{"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": "This, then?"}]}]
    given = [{**row, "teacher_prompt": None} for row in dataset]
    given[0]["teacher_prompt"], given[2]["teacher_prompt"] = own, own
    given[3]["teacher_prompt"] = named
    trainer = make(tmp_path, family, dataset)
    trainer.model.eval()
    batch = trainer._prepare_inputs(given)
    student, processor = vision_pair(family, seed=0)
    as_read = [
        {**row, "prompt": own if i in (0, 2) else row["prompt"], "images": row["images"]}
        for i, row in enumerate(dataset)
    ]
    as_read[3] |= {"prompt": [{"role": "user", "content": "This, then?"}], "images": [shown]}
    teacher = vision_model(family, seed=1)
    loss = trainer.rollout_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(_two_prompts(student, teacher, processor, dataset, as_read, batch), rel=1e-4)


def _two_prompts(student, teacher, processor, dataset, as_read, batch):
    total = 0.0
    columns = (dataset, as_read, batch["completion_ids"], batch["completion_mask"].bool())
    with torch.no_grad():
        for row, read, ids, mask in zip(*columns, strict=True):
            log_q = judged_alone(student, processor, row, ids[mask])
            log_p = judged_alone(teacher, processor, read, ids[mask])
            total = total + (log_q.exp() * (log_q - log_p)).sum().item()
    return total / batch["completion_mask"].sum().item()


def test_the_baseline_of_a_prompt_knows_its_image(tmp_path):
    """Equal words about another picture are another prompt."""
    seen = {}

    def reward(completions, **_):
        return [float(i) for i, _ in enumerate(completions)]

    same = [{"prompt": rows()[0]["prompt"], "images": [picture(seed, side=20)]} for seed in (1, 1, 2, 3)]
    trainer = make(tmp_path, "gemma3", Dataset.from_list(same), reward_funcs=[reward], reward_baseline="prompt")
    original = trainer.baseline.advantages
    trainer.baseline.advantages = lambda rewards, keys, training: (
        seen.update(keys=keys),
        original(rewards, keys, training),
    )[1]
    trainer.model.eval()
    batch = trainer._prepare_inputs(same)
    assert len(set(prompt_keys(batch["prompt_ids"], batch["prompt_mask"]).tolist())) == 1
    one, again, second, third = seen["keys"].tolist()
    assert one == again
    assert len({one, second, third}) == 3


REFUSED = {
    "text student": ({"student": "text"}, r"The training dataset has images in the column 'images', but the student"),
    "text teacher": ({"teacher": "text"}, r"The dataset has images, but the teacher .* is a text model"),
    "cross tokenizer": (
        {"cross_tokenizer": True, "teacher": "llava"},
        "another tokenizer, and .* is not made for images",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_who_cannot_see_is_refused(tmp_path, case):
    changes, message = REFUSED[case]
    changes = dict(changes)
    model, processor = vision_pair("gemma3", seed=0)
    tokenizer = make_tokenizer()
    student, reading = (make_model(), tokenizer) if changes.pop("student", None) else (model, processor)
    teacher = {"text": make_model(seed=2), None: vision_model("gemma3", seed=1)}.get(
        kind := changes.pop("teacher", None)
    )
    if kind == "llava":
        for part in vision_pair("llava", seed=1):
            part.save_pretrained(tmp_path / "teacher")
        teacher = str(tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        OPDTrainer(
            model=student,
            teacher_model=teacher,
            args=config(tmp_path, **changes),
            train_dataset=rows(),
            processing_class=reading,
        )


def test_rows_without_images_may_have_a_text_teacher(tmp_path):
    """Of the same vocabulary: what is refused is a teacher that would not see what the student sees."""
    model, processor = vision_pair("gemma3", seed=0)
    dataset = Dataset.from_list([{"prompt": row["prompt"]} for row in rows()])
    teacher = make_model(seed=2, vocab_size=len(processor.tokenizer))
    trainer = OPDTrainer(
        model=model,
        teacher_model=teacher,
        args=config(tmp_path),
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.train()
    assert len([log for log in trainer.state.log_history if "loss" in log]) == 2


def test_tools_of_rows_and_images_are_refused_together(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    dataset = Dataset.from_list([{**row, "tools": tools} for row in rows()])
    with pytest.raises(ValueError, match="images and a column `tools`"):
        make(tmp_path, "gemma3", dataset).train()


def test_rows_with_parts():
    image = {"type": "image", "image": picture(0)}
    row = {"prompt": [{"role": "user", "content": [image, {"type": "text", "text": "?"}]}]}
    assert check_row(row, "Row 0", parts=True) is row
    with pytest.raises(RowError, match="drop rows with images"):
        check_row(row, "Row 0")
    odd = {"prompt": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}
    with pytest.raises(RowError, match="which is not text and images"):
        check_row(odd, "Row 0", parts=True)
    empty = {"prompt": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}
    with pytest.raises(RowError, match="must have text"):
        check_row(empty, "Row 0", parts=True)


def test_datasets_with_images():
    assert shows_images(rows())
    assert shows_images(in_messages(rows()))
    assert not shows_images(rows((0, 0, 0, 0)))
    assert not shows_images(Dataset.from_dict({"prompt": ["a"]}))
    assert EncodedPrompt([1]).pixels == {}


ASKS_FOR_IMAGES = """{%- for message in messages %}{%- for part in message['content'] %}
{%- if 'image' in part %}<start_of_image>{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}{%- endfor %}"""  # as Qwen's templates do


def test_empty_fields_that_arrow_adds_are_no_images():
    """In prompts without images and in completions, too."""
    _, processor = vision_pair("gemma3")
    processor.chat_template = ASKS_FOR_IMAGES
    image, text = {"type": "image", "image": picture(0)}, {"type": "text", "text": "a cat"}
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": [image, text]}],
                "completion": [{"role": "assistant", "content": [text]}],
            },
            {
                "prompt": [{"role": "user", "content": [text]}],
                "completion": [{"role": "assistant", "content": [text, image]}],
            },
        ]
    )
    assert "image" in dataset[1]["prompt"][0]["content"][0]
    first, second = (tidy_row(row) for row in dataset)
    assert first["completion"][0]["content"] == [text]
    assert second["prompt"][0]["content"] == [text]
    with_image, without = encode(processor, [prompt_of(first), prompt_of(second)])
    marks = [processor.tokenizer.decode(ids.ids).count("<image_soft_token>") for ids in (with_image, without)]
    assert marks[0] > 0 == marks[1]
    eos = processor.tokenizer.eos_token_id
    batch = completion_batch([first], 0, 1, processor.tokenizer, [eos], 9, processor=processor)
    assert processor.tokenizer.decode(batch["completion_ids"][0]).startswith("a cat")


@pytest.mark.parametrize("column", ["image", "images", "prompt"])
def test_images_are_found_in_any_row(column):
    prompt = [{"role": "user", "content": "a"}]
    empty = {"image": {"image": None}, "images": {"images": []}, "prompt": {}}[column]
    shown = {"image": {"image": picture(0)}, "images": {"images": [picture(0)]}, "prompt": {}}[column]
    if column == "prompt":
        rows_of = [[{"role": "user", "content": [{"type": "text", "text": "a"}]}] for _ in range(1500)]
        rows_of.append([{"role": "user", "content": [{"type": "image", "image": picture(0)}]}])
        late = Dataset.from_list([{"prompt": one} for one in rows_of])
    else:
        late = Dataset.from_list([{"prompt": prompt, **empty}] * 1500 + [{"prompt": prompt, **shown}])
    assert shows_images(late)
    assert shows_images(late.select([1500, 3]))
    assert not shows_images(late.select(range(1500)))


def test_a_teacher_that_sees_nothing_is_refused_when_an_image_comes_after_all(tmp_path):
    """Of a stream it is not known beforehand."""
    model, processor = vision_pair("gemma3", seed=0)

    def stream():
        yield from ({"prompt": row["prompt"], "images": row["images"]} for row in rows() for _ in range(2))

    given = IterableDataset.from_generator(stream)  # its columns are not known
    trainer = OPDTrainer(
        model=model,
        teacher_model=make_model(seed=2, vocab_size=len(processor.tokenizer)),
        args=config(tmp_path),
        train_dataset=given,
        processing_class=processor,
    )
    with pytest.raises(ValueError, match="is a text model"):
        trainer.train()


def test_where_the_teachers_prompt_has_its_images():
    image = picture(0)
    row = {"prompt": [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "q"}]}]}
    plain = prompt_of({**row, "teacher_prompt": [{"role": "user", "content": "hint"}]}, "teacher_prompt")
    assert plain[0]["content"] == [{"type": "image", "image": image}, {"type": "text", "text": "hint"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hint"}]}]
    assert prompt_of({"prompt": "x", "image": image, "teacher_prompt": parts}, "teacher_prompt") == plain
    with pytest.raises(ValueError, match="the teacher prompt 'hint', which is text"):
        prompt_of({"prompt": parts, "image": image, "teacher_prompt": "hint"}, "teacher_prompt")
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    with pytest.raises(ValueError, match="In the prompt"):
        prompt_of({"prompt": two, "image": image})


def test_keys_of_images_do_not_depend_on_other_rows():
    _, processor = vision_pair("idefics3")
    one, three = encode(processor, [prompt_of(tidy_row(row)) for row in rows((1, 0, 3, 0))])[::2]
    alone = Images.of_prompts([one], len(one.ids), 0, "cpu")
    batch = {"prompt_ids": torch.zeros(2, 99), **columns_of([one, three], 99, 1)}
    assert keys_of(alone, 1)[0] == keys_of(Images.from_inputs(batch), 2)[0]
    assert keys_of(None, 2).tolist() == [0, 0]


def test_prompts_without_images_are_encoded_together(monkeypatch):
    _, processor = vision_pair("qwen2_5_vl")
    calls, original = [], type(processor).apply_chat_template
    monkeypatch.setattr(
        type(processor), "apply_chat_template", lambda self, *a, **kw: (calls.append(1), original(self, *a, **kw))[1]
    )
    prompts = [prompt_of(tidy_row(row)) for row in rows((0, 1, 0, 0))]
    found = encode(processor, prompts)
    assert len(calls) == 2
    assert [bool(prompt.pixels) for prompt in found] == [False, True, False, False]
    assert [prompt.ids for prompt in found] == [encode(processor, [prompt])[0].ids for prompt in prompts]


def test_a_dataset_completion_with_tools():
    _, processor = vision_pair("gemma3")
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    row = {**rows()[0], "tools": tools}
    how = Sampling(8, (processor.tokenizer.eos_token_id,))
    found = dataset_completion(row, processor.tokenizer, how, processor=processor)
    assert found.read.images == 1
