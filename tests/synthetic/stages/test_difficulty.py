"""IFD: equal to a naive computation of one row at a time, whatever the batch, the BOS token and the template."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import TOOL_TEMPLATE, VOCAB, make_model, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from trl_distill.synthetic.records import Answered, Refusal
from trl_distill.synthetic.stages.difficulty import (
    PLAIN,
    Difficulty,
    DifficultyModel,
    PromptDifficulties,
    check_difficulty_model,
)


ROWS = [
    Answered("a b c", "d e f", {}),
    Answered("g", "h i j k l a b c d e f", {}),
    Answered("a b c d e f g h", "i j", {}),
    Answered([{"role": "user", "content": "a b"}], "c d e", {}),
    Answered([{"role": "user", "content": "k"}, {"role": "assistant", "content": "l"}], "a", {}),
]


@pytest.fixture(params=["untied", "softcap", "gpt2"])
def load(request, tmp_path):
    """Saves a tiny model with or without a BOS token and a template, and loads it as the difficulty model."""

    def make(bos: bool = True, template: bool = True, batch_size: int = 16) -> DifficultyModel:
        if request.param == "gpt2":  # absolute positions
            set_seed(3)
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
            model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=None, eos_token_id=1, **sizes))
        else:
            model = make_model(request.param, seed=3)
        model.save_pretrained(tmp_path)
        tokenizer = make_tokenizer()
        tokenizer.bos_token = "a" if bos else None
        tokenizer.chat_template = TOOL_TEMPLATE if template else None
        tokenizer.save_pretrained(tmp_path)
        return DifficultyModel(str(tmp_path), batch_size)

    return make


def naive(model: DifficultyModel, row: Answered, bos: bool, template: bool) -> Difficulty:
    """Token by token, from the model's own logits in fp64."""
    tokenizer = model.tokenizer
    if isinstance(row.prompt, str):
        prompt = tokenizer(row.prompt)["input_ids"]
    elif template:
        text = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        said = row.prompt[0]["content"] if len(row.prompt) == 1 else "user: k\nassistant: l"
        prompt = tokenizer(PLAIN.format(said))["input_ids"]
    completion = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    skipped = 0 if bos else 1
    means = []
    for before in (prompt, [tokenizer.bos_token_id] if bos else []):
        losses = []
        for i in range(skipped, len(completion)):
            ids = torch.tensor([[*before, *completion[:i]]])
            with torch.no_grad():
                logits = model.model(ids).logits[0, -1].double()
            losses.append(-float(logits.log_softmax(-1)[completion[i]]))
        means.append(math.exp(sum(losses) / len(losses)))
    return Difficulty(*means)


@pytest.mark.parametrize(("bos", "template"), [(True, True), (False, True), (True, False)])
def test_equal_to_a_naive_computation(load, bos, template):
    model = load(bos, template)
    found = model.measure(ROWS)
    for row, value in zip(ROWS, found, strict=True):
        if not bos and row.completion == "a":  # its only token cannot be scored alone
            assert isinstance(value, Refusal)
            continue
        expected = naive(model, row, bos, template)
        assert value.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert value.perplexity_alone == pytest.approx(expected.perplexity_alone, rel=1e-4)
        assert value.ifd == pytest.approx(expected.perplexity / expected.perplexity_alone, rel=1e-4)
    assert len({round(value.ifd, 6) for value in found if isinstance(value, Difficulty)}) > 3


def test_batches_change_nothing_but_rounding(load):
    alone = [one for row in ROWS for one in load(batch_size=1).measure([row])]
    for size in (2, 3, 16):
        for value, expected in zip(load(batch_size=size).measure(ROWS), alone, strict=True):
            assert value.ifd == pytest.approx(expected.ifd, rel=1e-5)


def test_what_is_longer_than_the_context_is_cut_on_both_sides(load):
    model = load()
    whole = Answered("a b", " ".join("cdefgh" * 15), {})
    model.longest = 12
    prompt = len(model.tokenizer("a b")["input_ids"])
    ids = model.tokenizer(whole.completion, add_special_tokens=False)["input_ids"][: 12 - prompt]
    (found,) = model.measure([whole])
    (expected,) = model.measure([Answered("a b", model.tokenizer.decode(ids), {})])
    assert found == expected
    model.longest = prompt
    assert [refusal.kind for refusal in model.measure([whole, Answered("a", "", {})])] == [
        "no difficulty: too short, or prompt too long for the model"
    ] * 2
    assert model.measure([]) == []


def test_values_are_stored_exactly(load):
    values = [*load().measure(ROWS), Refusal("kind", "detail")]
    assert PromptDifficulties.from_dict(PromptDifficulties(3, values).as_dict()) == PromptDifficulties(3, values)


def test_a_model_that_scales_its_logits_afterwards_is_refused(load):
    model = load()
    forward = model.model.forward

    def scaled(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * 30
        return output

    model.model.forward = scaled
    with pytest.raises(ValueError, match="not those of its LM head"):
        model._check_head("someone")


def test_a_model_that_is_not_there_is_found_early(tmp_path):
    check_difficulty_model(None)
    with pytest.raises(ValueError, match="could not be found"):
        check_difficulty_model(str(tmp_path / "nowhere"))
