"""The tiny vision-language models that other tests use: they see, they can be saved, and resolutions differ."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vision_models import FAMILIES, picture, tokens_per_image, vision_model, vision_pair, vision_processor


def encoded(processor, *seeds: int, side: int = 28):
    """One prompt for each picture, padded to the longest."""
    words = ["Look.", "What is here?"]
    prompts = [
        [{"role": "user", "content": [{"type": "image", "image": picture(seed, side)}, {"type": "text", "text": text}]}]
        for seed, text in zip(seeds, words, strict=True)
    ]
    return processor.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


@torch.no_grad()
def last_log_probs(model, inputs) -> torch.Tensor:
    return model(**inputs).logits[:, -1].log_softmax(-1)  # (B, V)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_depend_on_the_picture_and_only_on_the_rows_own(family):
    model, processor = vision_pair(family)
    one, other = (last_log_probs(model, encoded(processor, seed, 1)) for seed in (0, 2))
    kl = (one.exp() * (one - other)).sum(-1)
    assert kl[0] > 0.01
    assert kl[1].abs() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_gives_the_same_model_and_processor(family, tmp_path):
    model, processor = vision_pair(family, seed=3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs, again = encoded(processor, 0, 1), encoded(AutoProcessor.from_pretrained(tmp_path), 0, 1)
    assert inputs.keys() == again.keys()
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    torch.testing.assert_close(last_log_probs(loaded, again), last_log_probs(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_resolution_makes_another_number_of_image_tokens(family):
    counts = []
    for resolution in (16, 32):
        model, inputs = vision_model(family, resolution=resolution), encoded(vision_processor(family, resolution), 0, 1)
        counts.append((inputs["input_ids"] == model.config.image_token_id).sum(-1).tolist())
        assert last_log_probs(model, inputs).isfinite().all()
    assert counts == [[tokens_per_image(16)] * 2, [tokens_per_image(32)] * 2] == [[4, 4], [16, 16]]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"])
def test_one_model_takes_both_resolutions(family):
    model = vision_model(family, resolution=32)
    for resolution in (16, 32):
        assert last_log_probs(model, encoded(vision_processor(family, resolution), 0, 1)).isfinite().all()
