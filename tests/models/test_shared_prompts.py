"""Prompts that rows share are read once: the same hidden states, refused where a cache cannot be repeated."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, PAD, SIZES, VOCAB, make_model
from hybrid_models import hybrid
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, set_seed

from trl_distill.models import hidden_states, shared_prompts
from trl_distill.models.hidden_states import add_teacher_forward
from trl_distill.models.properties import backbone_of
from trl_distill.models.shared_prompts import Prompts
from trl_distill.rollouts import Rollouts
from trl_distill.teachers.local import in_parts, parts_of


PROMPT, COMPLETION = 24, 7
OF_ROW = [0, 1, 0, 2, 1, 0]  # three prompts, of which the last has one completion


def rollouts(padded: bool = True, prompt: int = PROMPT) -> Rollouts:
    """Left padding that differs between prompts, and completions of all lengths, one of them empty."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, VOCAB, (3, prompt), generator=draw)
    attended = torch.ones(3, prompt, dtype=torch.long)
    if padded:
        attended[1, :9] = attended[2, : prompt // 2] = 0
    completions = torch.randint(2, VOCAB, (6, COMPLETION), generator=draw)
    lengths = torch.tensor([COMPLETION, 3, 1, 4, COMPLETION - 1, 0])
    mask = torch.arange(COMPLETION) < lengths[:, None]
    ids = torch.cat([prompts.masked_fill(attended == 0, PAD)[OF_ROW], completions.masked_fill(~mask, PAD)], dim=1)
    return Rollouts(ids, torch.cat([attended[OF_ROW], mask.long()], dim=1), mask)


def states(model, given: Rollouts, share: int | None) -> torch.Tensor:
    with torch.no_grad():
        inputs = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
        return model(**inputs, rollouts=given, share_prompts=share).hidden


def verdict(model) -> int | None:
    return getattr(model, shared_prompts._VERDICT, None)


def tokens_read(model, monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the ids that the backbone has been given since."""
    backbone, seen = backbone_of(model), []
    run = backbone.forward
    monkeypatch.setattr(
        backbone, "forward", lambda *a, **k: (seen.append(tuple(k["input_ids"].shape)), run(*a, **k))[1]
    )
    return seen


def windowed(window: int = 8):
    """Mistral, whose layers see the last `window` tokens alone."""
    set_seed(3)
    return AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=window)).eval()


def absolute():
    set_seed(3)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    return AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=VOCAB, bos_token_id=None, eos_token_id=EOS, **sizes)
    ).eval()


MODELS = {
    **{family: lambda family=family: make_model(family, seed=1).eval() for family in ("tied", "softcap", "bias")},
    "window": windowed,
    "alternating windows": lambda: make_model("softcap", seed=1, sliding_window=8).eval(),
    "absolute positions": absolute,
}


@pytest.mark.parametrize("at_once", [1, 2, 6])
@pytest.mark.parametrize("name", MODELS)
def test_the_states_are_those_of_whole_rows(name, at_once, monkeypatch):
    model, given = MODELS[name](), rollouts()
    add_teacher_forward(model)
    expected = states(model, given, None)
    torch.testing.assert_close(states(model, given, at_once), expected, rtol=1e-4, atol=1e-5)
    assert verdict(model) == PROMPT + COMPLETION
    seen = tokens_read(model, monkeypatch)
    torch.testing.assert_close(states(model, given, at_once), expected, rtol=1e-4, atol=1e-5)
    assert seen[0] == (3, PROMPT)  # each prompt once, and no token of a prompt again
    assert all(rows <= at_once and columns < COMPLETION for rows, columns in seen[1:])


def test_every_row_sees_its_own_prompt():
    """Rows whose prompts differ in one token, or only in their padding, have different prompts."""
    given = rollouts()
    ids, attended = given.input_ids[:3].clone(), given.attention_mask[:3].clone()
    ids[1], attended[1] = ids[0], attended[0]
    attended[1, 0] = 0
    ids[2] = ids[0]
    attended[2] = attended[0]
    ids[2, 5] = (ids[2, 5] + 1) % VOCAB
    found = Prompts.among(ids, attended, COMPLETION)
    assert len(found.first) == 3
    assert found.of_row[found.first].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_hybrid_models_read_whole_rows(name, monkeypatch):
    model, given = hybrid(name), rollouts(padded=False)
    add_teacher_forward(model)
    assert not shared_prompts.can_share(model)
    expected, seen = states(model, given, None), tokens_read(model, monkeypatch)
    assert torch.equal(states(model, given, 6), expected)
    assert seen == [(6, PROMPT + COMPLETION)]
    prompts = Prompts.among(given.input_ids, given.attention_mask, COMPLETION)
    inputs = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
    with torch.no_grad():  # the cache shows it, too, whatever the configuration says
        assert shared_prompts.completion_states(backbone_of(model), inputs, prompts, 6) is None


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic", "factor": 2.0}, {"full_attention": {"rope_type": "longrope"}}]
)
def test_positions_that_depend_on_the_whole_length_are_refused(rope):
    model = make_model("untied")
    model.config.rope_parameters = {"rope_theta": 1e4, **rope}
    assert "whole sequence" in shared_prompts.obstacle(model)
    assert not shared_prompts.obstacle(make_model("untied"))


def test_a_model_that_differs_is_refused_after_comparing(monkeypatch, caplog):
    """A model that forgets the cached keys; what is returned is right all the same, and it is tried once."""
    model, given = make_model("tied", seed=1).eval(), rollouts()
    add_teacher_forward(model)
    expected = states(model, given, None)
    forgetful(monkeypatch)
    for _ in range(2):
        torch.testing.assert_close(states(model, given, 2), expected, rtol=1e-4, atol=1e-5)
    assert verdict(model) == 0
    assert caplog.text.count("reads the prompt of every row") == 1


def test_a_model_that_cannot_continue_from_a_cache_is_refused(monkeypatch, caplog):
    """As CPM-Ant, whose bias of positions counts the new tokens alone."""
    model, given = make_model("tied", seed=1).eval(), rollouts()
    add_teacher_forward(model)
    expected = states(model, given, None)

    def fails(self, kept, new):
        raise RuntimeError("The size of tensor a must match")

    monkeypatch.setattr(shared_prompts._RepeatedLayer, "_joined", fails)
    for _ in range(2):
        torch.testing.assert_close(states(model, given, 2), expected, rtol=1e-4, atol=1e-5)
    assert verdict(model) == 0
    assert "cannot continue from a cache (RuntimeError: The size of tensor a must match)" in caplog.text


def test_memory_that_runs_out_says_nothing_of_a_model(monkeypatch):
    model, given = make_model("tied", seed=1).eval(), rollouts()
    add_teacher_forward(model)

    def fails(self, kept, new):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(shared_prompts._RepeatedLayer, "_joined", fails)
    with pytest.raises(torch.OutOfMemoryError):
        states(model, given, 2)
    assert verdict(model) is None


def test_longer_rows_are_compared_again(monkeypatch):
    """Twice as long, or the first that reach a sliding window."""
    compared = []
    complete = shared_prompts.completion_states
    monkeypatch.setattr(
        shared_prompts, "completion_states", lambda *a: (compared.append(a[1]["input_ids"].shape[1]), complete(*a))[1]
    )
    model = windowed(window=40)
    for prompt in (20, 22, 34, 36, 90):
        given = rollouts(padded=False, prompt=prompt)
        inputs = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
        with torch.no_grad():
            assert shared_prompts.is_exact(model, inputs, Prompts.among(*inputs.values(), COMPLETION))
    assert compared == [27, 41, 97]


@pytest.mark.parametrize("why", ["gradient", "training", "nothing shared", "little shared"])
def test_whole_rows_are_read_where_it_is_needed_or_saves_little(why, monkeypatch):
    monkeypatch.setattr(hidden_states, "packs", lambda model: False)
    model, given = make_model("tied", seed=1).eval(), rollouts()
    add_teacher_forward(model)
    if why == "nothing shared":
        given = given.rows(torch.tensor([0, 1, 3]))
    if why == "little shared":  # 1 of 6 prompts, each 1 of 8 tokens
        given = rollouts(padded=False, prompt=1)
    if why == "training":
        model.train()
    seen = tokens_read(model, monkeypatch)
    with torch.set_grad_enabled(why == "gradient"):
        model(input_ids=given.input_ids, attention_mask=given.attention_mask, rollouts=given, share_prompts=6)
    assert seen == [tuple(given.input_ids.shape)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 99])
def test_parts_hold_whole_groups(size):
    """Rows in the order of their lengths as far as that goes; more than `size` rows only for one prompt."""
    given = rollouts()
    parts = [part.tolist() for part in parts_of(given, size, True)]
    assert sorted(row for part in parts for row in part) == list(range(6))
    for part in parts:
        prompts = {OF_ROW[row] for row in part}
        assert len(part) <= size or len(prompts) == 1
        for prompt in prompts:
            assert {row for row in range(6) if OF_ROW[row] == prompt} <= set(part)
    plain = [part.tolist() for part in parts_of(given, size, False)]
    alone = given.rows(torch.tensor([0, 1, 3]))
    assert [p.tolist() for p in parts_of(alone, 2, True)] == [p.tolist() for p in parts_of(alone, 2, False)]
    assert sum(map(len, plain)) == 6


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("size", [None, 1, 2, 4])
def test_a_batch_in_parts_is_the_same(size, trims, monkeypatch):
    model, given = make_model("tied", seed=1).eval(), rollouts()
    add_teacher_forward(model)
    with torch.no_grad():
        expected = in_parts(model, given, size, trims).hidden
        found = in_parts(model, given, size, trims, shares_prompts=True).hidden
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        seen = tokens_read(model, monkeypatch)
        torch.testing.assert_close(
            in_parts(model, given, size, trims, shares_prompts=True).hidden, expected, rtol=1e-4, atol=1e-5
        )
    long = [shape for shape in seen if shape[1] > COMPLETION]
    assert sum(rows for rows, _ in long) == 3  # each prompt once, though the group is larger than a part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_shared_too(dtype):
    set_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "head_dim": 32, "initializer_range": 0.1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).to(dtype).eval()
    add_teacher_forward(model)
    given = rollouts()
    expected, found = states(model, given, None), states(model, given, 6)
    assert verdict(model)
    assert (found - expected).float().norm() / expected.float().norm() < 0.02


def forgetful(monkeypatch) -> None:
    """From now on, the cached keys and values of prompts are zeros."""
    monkeypatch.setattr(
        shared_prompts._RepeatedLayer, "_joined", lambda self, kept, new: torch.cat([kept[self._rows] * 0, new], -2)
    )


def shortened(given: Rollouts, rows: list[int]) -> Rollouts:
    """The same with completions of one token in these rows."""
    mask, attended = given.mask.clone(), given.attention_mask.clone()
    mask[rows, 1:], attended[rows, -COMPLETION + 1 :] = False, 0
    return Rollouts(given.input_ids, attended, mask)


def test_the_longest_completions_are_compared(monkeypatch):
    """The first rows end after one token, which says nothing about continuing."""
    model = make_model("tied", seed=1).eval()
    add_teacher_forward(model)
    given = shortened(rollouts().rows(torch.tensor([2, 5, 3, 0, 1, 4])), [0, 2])
    expected = states(model, given, None)
    forgetful(monkeypatch)
    torch.testing.assert_close(states(model, given, 6), expected, rtol=1e-4, atol=1e-5)
    assert verdict(model) == 0


def test_nothing_is_said_of_a_model_before_a_prompt_was_continued(monkeypatch):
    model = make_model("tied", seed=1).eval()
    add_teacher_forward(model)
    given = shortened(rollouts(), [0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(states(model, given, 6), states(model, given, None))
    assert verdict(model) is None
    assert shared_prompts.can_share(model)
    forgetful(monkeypatch)
    torch.testing.assert_close(states(model, rollouts(), 6), states(model, rollouts(), None), rtol=1e-4, atol=1e-5)
    assert verdict(model) == 0


def test_under_autocast_rounding_is_that_of_16_bits(monkeypatch):
    """Products of other shapes are rounded otherwise; here cached values are, by a bfloat16's last place."""
    model = make_model("tied", seed=1).eval()
    add_teacher_forward(model)
    joined = shared_prompts._RepeatedLayer._joined
    rounding = torch.tensor([1.0, 1 + 2**-7])
    monkeypatch.setattr(
        shared_prompts._RepeatedLayer,
        "_joined",
        lambda self, kept, new: joined(self, kept * rounding.to(kept).repeat(kept.shape[-1] // 2), new),
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert states(model, rollouts(), 6).dtype == torch.float32
    assert verdict(model)


def test_models_that_fsdp2_shards_read_whole_rows():
    """Also where its root is whole after a first forward pass, and inside of one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model("tied", seed=1).eval()
    add_teacher_forward(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        for _ in range(2):
            states(model, rollouts(), 6)
            assert "sharded" in shared_prompts.obstacle(model)
        assert verdict(model) is None
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["tied", "window"])
def test_the_gradient_passes_through_shared_prompts(name):
    """That is not used in training: what it would save is in docs/benchmarks.md."""
    model, given = MODELS[name](), rollouts(padded=False)
    inputs = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
    aim = torch.randn(int(given.mask.sum()), SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    gradients = []
    for shared in (False, True):
        model.zero_grad()
        if shared:
            prompts = Prompts.among(*inputs.values(), COMPLETION)
            found = shared_prompts.completion_states(backbone_of(model), inputs, prompts, 6)
        else:
            found = backbone_of(model)(**inputs, use_cache=False).last_hidden_state[:, PROMPT - 1 : -1]
        (found[given.mask] * aim).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone_of(model).parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
