"""The fused head in one pass: gradients that were foreseen and that were not, and how often heads are multiplied by."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from helpers import VOCAB, batch, config, gradients, in_training, make_model, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from trl_distill import OPDTrainer
from trl_distill.heads import fused, tiles
from trl_distill.heads.comparison import comparison
from trl_distill.heads.fused import DivergenceSpec, ExpectedSlopes, fused_divergence
from trl_distill.heads.lm_head import LMHead
from trl_distill.heads.tiles import TileSizes
from trl_distill.models.student import ForwardPlan
from trl_distill.objective import divergences


N = 7
FORMS = [DivergenceSpec(), DivergenceSpec("forward_kl", stops=(1, 5)), DivergenceSpec("jsd", 0.3, temperature=0.7)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "ON_CPU", TileSizes(tile=5 * VOCAB, part=3 * VOCAB, ids=VOCAB // 2 - 1))


@pytest.fixture(params=["bias", "softcap", "scale"])
def given(request):
    """Hidden states of both, both heads, sampled ids."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = make_model(request.param, seed=1), make_model("tied", seed=2, hidden_size=24)
    hidden = torch.randn(N, 16, generator=generator).requires_grad_()
    teacher_hidden, ids = torch.randn(N, 24, generator=generator), torch.randint(VOCAB, (N,), generator=generator)
    return hidden, LMHead(student), teacher_hidden, LMHead(teacher), ids


def derived(given, form: DivergenceSpec, upstream: tuple, slopes: ExpectedSlopes | None) -> list[torch.Tensor]:
    """Gradients of Σ upstream · (divergence, log q) in hidden states, weight and bias."""
    hidden, head, teacher_hidden, teacher_head, ids = given
    found = fused_divergence(hidden, head, teacher_hidden, teacher_head, form, ids, slopes)
    loss = sum((u * part).sum() for u, part in zip(upstream, found, strict=False) if u is not None)
    return list(torch.autograd.grad(loss, [hidden, *(p for p in head.parameters() if p is not None)]))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_that_the_logits_tell(given, form):
    hidden, head, teacher_hidden, teacher_head, ids = given
    found = fused_divergence(hidden, head, teacher_hidden, teacher_head, form, ids)
    log_q = (head.logits(hidden) / form.temperature).log_softmax(-1)
    log_p = (teacher_head.logits(teacher_hidden) / form.temperature).log_softmax(-1)
    at = torch.arange(N)
    torch.testing.assert_close(found.log_q, log_q[at, ids])
    torch.testing.assert_close(found.log_p, log_p[at, ids])
    torch.testing.assert_close(found.entropy, -(log_q.exp() * log_q).sum(-1))
    assert (found.divergence.requires_grad, found.log_q.requires_grad) == (True, True)
    assert (found.entropy.requires_grad, found.log_p.requires_grad) == (False, False)
    for positions in (slice(start, None, step) for step in range(1, 9) for start in range(step)):
        compared = fused_divergence(
            hidden, head, teacher_hidden, teacher_head, form, ids, positions=positions
        ).comparison
        torch.testing.assert_close(compared, comparison(log_q[positions], log_p[positions], form.stops))
    assert found.comparison.shape == (5, 0)
    leaves = [hidden, *(p for p in head.parameters() if p is not None)]
    weights = torch.linspace(-1, 1, N)
    ours = torch.autograd.grad((weights * found.log_q).sum(), leaves)
    naive = torch.autograd.grad((weights * log_q[at, ids]).sum(), leaves)
    for a, b in zip(ours, naive, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_whatever_was_foreseen_the_gradient_is_right(given, form):
    """Foreseen up to a factor, not at all, in part, for the wrong tokens, or where nothing arrives."""
    generator = torch.Generator().manual_seed(1)
    d, q = torch.randn(2, N, generator=generator)
    half = torch.cat([d[:3], torch.randn(N - 3, generator=generator)])
    for upstream in ((d, q), (d, None), (None, q)):
        expected = derived(given, form, upstream, None)
        for slopes in (
            ExpectedSlopes(d, q),
            ExpectedSlopes(7 * d, 7 * q),
            ExpectedSlopes(-d),
            ExpectedSlopes(d, torch.zeros(N)),
            ExpectedSlopes(half, q),
            ExpectedSlopes(torch.zeros(N), torch.zeros(N)),
            ExpectedSlopes(torch.randn(N, generator=generator), torch.randn(N, generator=generator)),
        ):
            for found, right in zip(derived(given, form, upstream, slopes), expected, strict=True):
                assert relative_error(found, right) < 1e-4


def test_autocast_rounds_what_is_multiplied_and_nothing_else(given):
    """Values and gradients are those in fp32 of rounded states and weights, but for the rounding of the gradients."""
    hidden, head, teacher_hidden, teacher_head, ids = given
    d, q = torch.linspace(0.1, 1, N), torch.linspace(-1, 1, N)
    found = {}
    for rounded in (True, False):
        if not rounded:
            with torch.no_grad():
                hidden, teacher_hidden = (x.bfloat16().float() for x in (hidden, teacher_hidden))
                hidden.requires_grad_()
                for which in (head, teacher_head):
                    which.parameters()[0].copy_(which.parameters()[0].bfloat16())
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            found[rounded] = fused_divergence(
                hidden, head, teacher_hidden, teacher_head, DivergenceSpec(), ids, ExpectedSlopes(d, q)
            )
        loss = (d * found[rounded].divergence + q * found[rounded].log_q).sum()
        found[rounded] += torch.autograd.grad(loss, [hidden, head.parameters()[0]])
    for ours, exact in zip(found[True][:4], found[False][:4], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    for ours, exact in zip(found[True][5:], found[False][5:], strict=True):
        assert relative_error(ours, exact) < 1e-2


def test_slopes_may_be_rounded(given):
    """As autocast may leave them: within what rounding does to them, and right all the same."""
    d, q = torch.linspace(0.1, 1, N), torch.linspace(-1, 1, N)
    expected = derived(given, DivergenceSpec(), (d, q), None)
    for found, right in zip(
        derived(given, DivergenceSpec(), (d, q), ExpectedSlopes(d.bfloat16(), q.bfloat16())), expected, strict=True
    ):
        assert relative_error(found, right) < 1e-4


@pytest.mark.parametrize("slope", [1.0, 4e-6, 1e-12, 0.0])
def test_fp16_loses_no_slope(given, slope):
    """The weight of a token is one over their number, and the loss scale comes only after the gradient is formed."""
    hidden, head, teacher_hidden, teacher_head, ids = given
    d, q = slope * torch.linspace(0.1, 1, N), -slope * torch.linspace(-1, 1, N)
    found = []
    for dtype in (torch.float16, torch.float32):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            foreseen = ExpectedSlopes(d, q)
            out = fused_divergence(hidden, head, teacher_hidden, teacher_head, DivergenceSpec(), ids, foreseen)
        loss = 2.0**16 * (d * out.divergence + q * out.log_q).sum()
        found.append(torch.autograd.grad(loss, [hidden, head.parameters()[0]]))
    for ours, exact in zip(*found, strict=True):
        assert ours.isfinite().all()
        assert relative_error(ours, exact) < 5e-3 or slope == 0


def test_a_derivative_beyond_fp16_is_formed_again_with_the_loss_scale(given, monkeypatch):
    """A divergence may have any derivative; of the loss, the loss scale keeps it in range."""
    hidden, head, teacher_hidden, teacher_head, ids = given
    summands = divergences.summands
    monkeypatch.setattr(divergences, "summands", lambda *args: 1e5 * summands(*args))
    found = []
    for dtype in (torch.float16, torch.float32):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            form = DivergenceSpec("forward_kl")
            out = fused_divergence(hidden, head, teacher_hidden, teacher_head, form, ids, ExpectedSlopes(torch.ones(N)))
        found.append(torch.autograd.grad(1e-4 * out.divergence.sum(), [hidden, head.parameters()[0]]))
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 5e-3


def test_a_second_backward_pass_is_right_too(given):
    hidden, head, teacher_hidden, teacher_head, ids = given
    d = torch.linspace(0.1, 1, N)
    found = fused_divergence(hidden, head, teacher_hidden, teacher_head, DivergenceSpec(), ids, ExpectedSlopes(d))
    first, second = (torch.autograd.grad((d * found.divergence).sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert relative_error(second, first) < 1e-5


class Products(TorchDispatchMode):
    """Counts, in tokens, the products of tiles of logits with a head: `(n, V)` on one side or as the result."""

    def __init__(self):
        super().__init__()
        self.tokens = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            sizes = (a.shape[0], a.shape[1], b.shape[1])
            if VOCAB in sizes:
                rest = list(sizes)
                rest.remove(VOCAB)
                self.tokens += min(rest)
        return out


def reward(completions, **_):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("rewards", "changes", "projections"),
    [
        (None, {}, 4),  # both forward, and two gradients
        ([reward], {}, 4),  # the same logits serve the policy loss
        ([reward], {"reward_start_step": 5}, 4),  # and weigh nothing before it begins
        (None, {"kl_discount": 0.5}, 8),  # what is still to come is not foreseen: both once more, and their gradients
    ],
    ids=["pure", "combined", "reward later", "discounted"],
)
def test_how_often_the_heads_are_multiplied_by(
    tmp_path, tokenizer, prompts, monkeypatch, rewards, changes, projections
):
    monkeypatch.setattr(tiles, "ON_CPU", TileSizes(tile=64 * VOCAB, part=64 * VOCAB, ids=64 * VOCAB))
    trainer = OPDTrainer(
        model=make_model("untied", seed=1),
        teacher_model=make_model("untied", seed=2),
        reward_funcs=rewards,
        args=config(tmp_path, num_generations=2 if rewards else 1, **changes),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    in_training(trainer)
    inputs = {**batch(rows=4), "rewards": torch.arange(4.0), "advantages": torch.tensor([-1.5, -0.5, 0.5, 1.5])}
    with Products() as products:
        trainer.rollout_loss(trainer.model, inputs).backward()
    assert products.tokens == projections * int(inputs["completion_mask"].sum())


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "grpo", "bnpo", "luspo", "sapo"])
@pytest.mark.parametrize("estimator", ["full", "topk", "sampled"])
def test_own_log_probabilities_change_nothing(tmp_path, tokenizer, prompts, monkeypatch, estimator, loss_type):
    """Loss and gradient are those with log-probabilities of TRL's forward."""
    student, teacher, found = make_model("tied", seed=1), make_model("untied", seed=2), {}
    for source in ("ours", "trl"):
        trainer = OPDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            reward_funcs=[reward],
            args=config(tmp_path, num_generations=2, kl_estimator=estimator, kl_top_k=4, loss_type=loss_type),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
        in_training(trainer)
        if source == "trl":
            monkeypatch.setattr(trainer.loss, "forward_plan", lambda *_, t=trainer: ForwardPlan(t.estimator))
        inputs = {**batch(rows=4), "rewards": torch.arange(4.0), "advantages": torch.tensor([-1.5, -0.5, 0.5, 1.5])}
        loss = trainer.rollout_loss(trainer.model, inputs)
        loss.backward()
        found[source] = loss.item(), gradients(trainer.model)
    assert found["ours"][0] == pytest.approx(found["trl"][0], rel=1e-5)
    assert relative_error(found["ours"][1], found["trl"][1]) < 1e-5


def test_memory_is_given_back_when_training_ends(tmp_path, tokenizer, prompts):
    trainer = OPDTrainer(
        model=make_model("tied", seed=1),
        teacher_model=make_model("untied", seed=2),
        args=config(tmp_path, max_steps=1),
        train_dataset=prompts,
        processing_class=tokenizer,
        callbacks=[Kept()],
    )
    trainer.train()
    assert Kept.seen == {"student", "teacher", "mass", "product"}
    assert not vars(tiles._kept)


class Kept(TrainerCallback):
    """Notes what is kept between micro-steps."""

    seen: set[str]

    def on_step_end(self, *_, **__):
        type(self).seen = set(vars(tiles._kept))


@pytest.mark.parametrize("elsewhere", [True, False])
def test_under_zero3_all_processes_take_part_where_one_must(given, monkeypatch, elsewhere):
    """Gathering is collective: a process whose gradient was foreseen goes along, and adds nothing."""
    head = given[1]
    d = torch.linspace(0.1, 1, N)
    expected = derived(given, DivergenceSpec(), (d, None), ExpectedSlopes(d))
    runs, run = [], fused._run
    monkeypatch.setattr(fused, "_run", lambda *args: runs.append(args[2]) or run(*args))
    monkeypatch.setattr(fused, "gathered_head", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.fill_(float(elsewhere)))
    monkeypatch.setattr(head.parameters()[0], "ds_id", 7, raising=False)
    found = derived(given, DivergenceSpec(), (d, None), ExpectedSlopes(d))
    assert len(runs) == 1 + elsewhere
    for ours, right in zip(found, expected, strict=True):
        assert relative_error(ours, right) < 1e-6
