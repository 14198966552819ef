"""Packing: used where rows do not see each other, refused where they would."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, VOCAB, make_model
from hybrid_models import hybrid
from transformers import AutoModelForCausalLM, GPT2Config

from trl_distill.models import hidden_states, packing
from trl_distill.models.hidden_states import last_hidden


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    attended = torch.ones_like(ids)
    attended[0, 6:] = attended[1, :2] = attended[1, 7:] = 0
    return ids, attended


@pytest.fixture
def flash(monkeypatch):
    """Every model is taken for one with FlashAttention; transformers makes a mask of the positions instead."""
    monkeypatch.setattr(hidden_states, "packs", lambda model: True)
    monkeypatch.setattr(packing, "takes_any_length", lambda model: True)


def batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of these lengths, padded on both sides as prompts and completions are."""
    longest = max(lengths) + 2
    places = torch.arange(longest).expand(len(lengths), -1)
    left = torch.tensor([(longest - length) // 2 for length in lengths])[:, None]
    attended = ((places >= left) & (places < left + torch.tensor(lengths)[:, None])).long()
    return torch.randint(2, VOCAB, attended.shape, generator=torch.Generator().manual_seed(0)), attended


def rows_read(model, monkeypatch) -> list[int]:
    """How many rows each later call of the backbone gets."""
    seen, forward = [], model.base_model.forward
    monkeypatch.setattr(
        model.base_model, "forward", lambda **given: (seen.append(len(given["input_ids"])), forward(**given))[1]
    )
    return seen


@pytest.mark.parametrize("family", ["tied", "untied", "softcap", "scale"])
def test_packed_rows_give_the_states_of_rows_alone(flash, family):
    model, (ids, attended) = make_model(family, seed=1).eval(), rows()
    found = last_hidden(model, input_ids=ids, attention_mask=attended)
    for row, mask, states in zip(ids, attended.bool(), found, strict=True):
        alone = model.base_model(input_ids=row[mask][None]).last_hidden_state[0]
        torch.testing.assert_close(states[mask], alone, rtol=1e-4, atol=1e-5)
        assert states[~mask].abs().sum() == 0
    assert packing.verdict(model) is True


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_rows_that_would_see_each_other_are_padded(flash, name, caplog):
    model, (ids, attended) = hybrid(name), rows()
    expected = model.base_model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    leaked = packing.packed_hidden(model.base_model, ids, attended)
    kept = attended.bool()
    assert (leaked[kept] - expected[kept]).norm() / expected[kept].norm() > 0.02  # what would have been learnt from
    for _ in range(2):
        found = last_hidden(model, input_ids=ids, attention_mask=attended)
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=1e-6)
    assert caplog.text.count("Batches are padded instead") == 1


def test_dropout_does_not_decide(flash):
    model, (ids, attended) = make_model("tied", seed=1, attention_dropout=0.5).train(), rows()
    last_hidden(model, input_ids=ids, attention_mask=attended)
    assert model.training
    assert packing.verdict(model) is True


def test_one_row_decides_nothing(flash):
    model, (ids, attended) = hybrid("lfm2"), rows()
    last_hidden(model, input_ids=ids[:1], attention_mask=attended[:1])
    assert packing.verdict(model) is None


def test_arguments_that_are_none_do_not_matter(flash, monkeypatch):
    """As PEFT passes them on for a causal LM."""
    model, (ids, attended) = make_model("tied", seed=1).eval(), rows()
    expected = last_hidden(model, input_ids=ids, attention_mask=attended)
    seen = rows_read(model, monkeypatch)
    found = last_hidden(model, input_ids=ids, attention_mask=attended, inputs_embeds=None, labels=None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert seen == [1]


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ("flash_attention_2", True),
        ("flash_attention_3", True),
        ("kernels-community/flash-attn2", True),
        ("kernels-community/vllm-flash-attn3", True),
        ("sdpa", True),
        ("eager", False),
        ("paged|flash_attention_2", False),
    ],
)
def test_which_attention_takes_rows_of_any_length(attention, expected):
    model = make_model("tied")
    model.config._attn_implementation_internal = attention
    assert packing.packs(model) is expected


def test_what_the_configuration_already_says():
    """Layers with a state, and positions that are added to the embeddings."""
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=EOS)
    )
    for model in (hybrid("lfm2"), hybrid("qwen3_next"), gpt2):
        model.config._attn_implementation_internal = "flash_attention_2"
        assert not packing.packs(model)


def test_masked_rows_are_packed_where_padding_is_much(monkeypatch):
    """States and gradients are those of padded rows; the first batch is tried on its beginnings both ways."""
    model, (ids, attended) = make_model("tied", seed=1).double(), batch(20, 3, 2, 5)
    assert model.config._attn_implementation == "sdpa"
    kept, found = attended.bool(), {}
    for way in ("padded", "packed"):
        monkeypatch.setattr(hidden_states, "pays", packing.pays if way == "packed" else lambda *_: False)
        seen = rows_read(model, monkeypatch)
        states = last_hidden(model, input_ids=ids, attention_mask=attended)
        gradient = torch.autograd.grad(states[kept].cos().sum(), [*model.base_model.parameters()])
        found[way] = (states[kept], *gradient)
        assert seen == {"padded": [4, 1, 4], "packed": [1]}[way]
    for padded, packed in zip(*found.values(), strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=5e-6)  # norms and rotations round to fp32


@pytest.mark.parametrize(
    ("lengths", "hidden_size", "expected"),
    [
        ((20, 20, 20, 20), 64, False),  # nothing to save
        ((20, 3, 2, 5), 64, True),
        ((20, 19, 18, 19), 64, False),
        ((1000, 900, 800, 850), 64, False),  # all tokens by all tokens cost more than padding
        ((1000, 300, 200, 100), 4096, True),
        ((9000, 8000, 4000, 4000), 4096, False),  # a mask of 25,000 by 25,000
        ((9000, 300, 200, 100), 4096, True),
    ],
)
def test_a_masked_batch_is_packed_where_it_pays(lengths, hidden_size, expected):
    model, (_, attended) = make_model("tied"), batch(*lengths)
    model.config.hidden_size = hidden_size
    assert packing.pays(model, attended) is expected
    model.config._attn_implementation_internal = "flash_attention_2"
    assert packing.pays(model, attended) is True


def test_the_trial_of_masked_rows_is_short(monkeypatch):
    model, (ids, attended) = make_model("tied"), batch(200, 190, 100, 30, 20, 10)
    shapes, forward = [], model.base_model.forward
    monkeypatch.setattr(
        model.base_model, "forward", lambda **given: (shapes.append(given["input_ids"].shape), forward(**given))[1]
    )
    assert packing.is_exact(model, ids, attended)
    assert [tuple(shape) for shape in shapes] == [(4, 64), (1, 64 * 3 + 30)]


def test_the_trial_leaves_nothing_behind(monkeypatch):
    """
    Frozen parts stay so, and autocast's cache has no weights: older PyTorch gives these to the next pass. What
    overrides `train`, to merge an adapter or to choose kernels, is not called: the trainer would not call it again.
    """
    casts, autocast = [], torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: (casts.append(k), autocast(*a, **k))[1])
    model, (ids, attended) = make_model("tied", seed=1).train(), batch(20, 3, 2, 5)
    model.base_model.layers[0].eval()
    monkeypatch.setattr(type(model.base_model), "train", lambda *_: pytest.fail("the mode was switched"))
    with autocast("cpu", dtype=torch.bfloat16):
        states = last_hidden(model, input_ids=ids, attention_mask=attended)
    states[attended.bool()].float().cos().sum().backward()
    assert casts == [{"dtype": torch.bfloat16, "enabled": True, "cache_enabled": False}]  # the run's
    assert packing.verdict(model) is True
    assert [layer.training for layer in model.base_model.layers] == [
        False,
        *[True] * (len(model.base_model.layers) - 1),
    ]
    assert all(weight.grad is not None and weight.grad.any() for weight in model.base_model.parameters())


def test_a_model_that_fails_on_one_sequence_is_padded(monkeypatch, caplog):
    model, (ids, attended) = make_model("tied", seed=1).eval(), batch(20, 3, 2, 5)
    expected, forward = last_hidden(model, input_ids=ids[:1], attention_mask=attended[:1]), model.base_model.forward

    def counts_rows(**given):
        if len(given["input_ids"]) == 1:
            raise IndexError("4 offsets for 1 row")
        return forward(**given)

    monkeypatch.setattr(model.base_model, "forward", counts_rows)
    with caplog.at_level("INFO"):
        found = last_hidden(model, input_ids=ids, attention_mask=attended)
    kept = attended[0].bool()
    torch.testing.assert_close(found[0][kept], expected[0][kept], rtol=1e-4, atol=1e-5)
    assert "it fails on one sequence (IndexError: 4 offsets for 1 row). Batches are padded" in caplog.text


def test_what_does_not_fit_is_no_verdict(monkeypatch):
    model, (ids, attended) = make_model("tied", seed=1).eval(), batch(20, 3, 2, 5)

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packing, "packed_hidden", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        packing.is_exact(model, ids, attended)
    assert packing.verdict(model) is None


def test_the_trial_of_a_compiled_model_compiles_nothing():
    graphs, (ids, attended) = [], batch(20, 3, 2, 5)
    model = make_model("tied", seed=1).eval()
    model.base_model.compile(backend=lambda graph, _: (graphs.append(graph), graph.forward)[1])
    assert packing.is_exact(model, ids, attended)
    assert not graphs
    model.base_model(input_ids=ids, attention_mask=attended)
    assert graphs


@pytest.mark.parametrize("any_length", [False, True])
def test_a_model_compiled_as_a_whole(any_length, monkeypatch):
    """Masked rows stay padded, since each batch would choose graphs of its own; the trial itself is not traced."""
    monkeypatch.setattr(packing, "takes_any_length", lambda model: any_length)
    model, (ids, attended) = make_model("tied", seed=1).eval(), batch(4, 40, 7, 5)
    packed, read = [], packing.packed_hidden
    monkeypatch.setattr(hidden_states, "packed_hidden", lambda *given: (packed.append(True), read(*given))[1])
    expected = last_hidden(model, input_ids=ids, attention_mask=attended)
    assert packed, "the batch pays when nothing is compiled"
    packed.clear()
    model = make_model("tied", seed=1).eval()  # not tried yet
    found = torch.compile(last_hidden, backend="eager")(model, input_ids=ids, attention_mask=attended)
    assert bool(packed) == any_length
    torch.testing.assert_close(found[attended.bool()], expected[attended.bool()], rtol=1e-4, atol=1e-5)


def test_what_counts_rows_is_not_packed(monkeypatch):
    from peft import LoraConfig, get_peft_model

    assert packing.packs(make_model("tied"))
    activated = LoraConfig(alora_invocation_tokens=[5], target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model("tied"), activated).get_base_model()
    assert "activated LoRA" in packing.obstacle(model)
    model = make_model("tied")
    model.get_input_embeddings().neftune_noise_alpha = 5
    assert "NEFTune" in packing.obstacle(model)
    model = make_model("tied")
    model.config.rope_parameters = {"rope_type": "longrope"}
    assert "length of the whole sequence" in packing.obstacle(model)
    model = make_model("tied")
    monkeypatch.setattr(type(model.base_model), "forward", lambda self, input_ids, attention_mask=None: None)
    assert "takes no `position_ids`" in packing.obstacle(model)


def test_a_verdict_is_that_of_an_attention():
    model, (ids, attended) = make_model("tied"), batch(20, 3)
    assert packing.is_exact(model, ids, attended)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert packing.verdict(model) is None


def test_masked_rows_that_would_see_each_other_are_padded_without_a_warning(monkeypatch, caplog):
    """Nobody who left the attention as it is has asked for packed rows."""
    monkeypatch.setattr(packing, "KNOWN_LAYERS", packing.KNOWN_LAYERS | {"conv"})
    monkeypatch.setattr(hidden_states, "packs", lambda model: True)
    model, (ids, attended) = hybrid("lfm2"), batch(20, 3, 2, 5)
    expected = model.base_model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    found = last_hidden(model, input_ids=ids, attention_mask=attended)
    torch.testing.assert_close(found[attended.bool()], expected[attended.bool()], rtol=1e-5, atol=1e-6)
    assert packing.verdict(model) is False
    assert "Batches are padded instead" not in caplog.text


@pytest.mark.parametrize("length", [64, 2048])
def test_a_leak_at_the_beginning_of_rows_is_no_rounding(length):
    """A short convolution disturbs three tokens of a row; over long rows in 16 bits that is a small part of all."""
    draw = torch.Generator().manual_seed(0)
    padded = torch.randn(4, length, 16, generator=draw)
    kept = torch.ones(4, length, dtype=torch.bool)
    kept[1, : length // 3] = False  # padded on the left
    rounded = padded * (1 + 4e-3 * torch.randn(padded.shape, generator=draw))
    assert not packing.leaks(rounded, padded, kept)
    leaking = rounded.clone()
    for row in range(1, 4):
        start = int(kept[row].int().argmax())
        leaking[row, start : start + 3] += 0.15 * torch.randn(3, 16, generator=draw)
    assert packing.leaks(leaking, padded, kept)
