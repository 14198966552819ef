"""Token weightings as functions: their formulas, statistics of the previous step, and what is refused before a run."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from helpers import config

from trl_distill import OPDConfig
from trl_distill.cli.train import parsed
from trl_distill.objective.weighting import ARGUMENTS, WEIGHTINGS, CustomWeighting, PreviousStep, make_weighting, tally


def previous_of(**values: torch.Tensor) -> PreviousStep:
    return PreviousStep({name: tally(one) for name, one in values.items()})


def weights(name, parameters=None, **measured):
    return make_weighting(name, parameters)(**{**dict.fromkeys(ARGUMENTS), **measured})


KL = torch.tensor([[0.0, 0.1, 0.3], [0.6, 3.0, 30.0]])


@pytest.mark.parametrize("previous", [None, previous_of(divergence=KL.flatten())])
def test_a_fixed_cap_is_the_minimum_of_one_and_c_over_kl(previous):
    expected = torch.tensor([[1, 1, 1], [0.5, 0.1, 0.01]])
    torch.testing.assert_close(weights("cap", {"nats": 0.3}, divergence=KL, previous=previous), expected)
    torch.testing.assert_close(KL * expected, KL.clamp(max=0.3))


def test_a_cap_that_follows_the_run_is_a_multiple_of_the_previous_mean():
    previous = previous_of(divergence=torch.tensor([0.0, 0.2, 0.4]))
    expected = weights("cap", {"nats": 0.6}, divergence=KL, previous=None)
    torch.testing.assert_close(weights("cap", {"times_mean": 3}, divergence=KL, previous=previous), expected)
    assert weights("cap", divergence=KL, previous=None).eq(1).all()  # nothing is known before the first step
    agreed = previous_of(divergence=torch.zeros(4))
    assert weights("cap", divergence=torch.zeros(1, 3), previous=agreed).eq(1).all()


@pytest.mark.parametrize(("name", "quantity"), [("top_share", "divergence"), ("student_entropy", "student_entropy")])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_share_of_the_tokens_is_kept(name, quantity, share):
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).mul(2).exp().view(40, 100)
    found = weights(name, {"share": share}, **{quantity: values}, previous=previous_of(**{quantity: values.flatten()}))
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    assert found.mean().item() == pytest.approx(share, abs=0.01)
    assert values[found == 1].min() >= values[found == 0].max() if share < 1 else found.all()
    assert weights(name, {"share": share}, **{quantity: values}, previous=None).eq(1).all()


def test_thresholds_are_quantiles_to_four_percent():
    values = torch.randn(3000, generator=torch.Generator().manual_seed(1)).mul(3).exp()
    previous = previous_of(divergence=values)
    for share in (0.01, 0.2, 0.5, 0.8, 0.99):
        assert previous.threshold("divergence", share) == pytest.approx(values.quantile(1 - share).item(), rel=0.05)
    assert previous.mean("divergence") == pytest.approx(values.mean().item(), rel=1e-5)
    assert previous_of(divergence=torch.zeros(9)).threshold("divergence", 0.5) == 0.0
    assert previous_of(divergence=torch.tensor([-1.0, 2.0])).mean("divergence") == pytest.approx(0.5)


def test_tallies_of_parts_add_up():
    values = torch.randn(500, generator=torch.Generator().manual_seed(1)).exp()
    torch.testing.assert_close(tally(values[:123]) + tally(values[123:]), tally(values))
    assert tally(values[:0]).sum() == 0


def test_the_teachers_entropy_and_the_position():
    entropy = torch.tensor([[0.0, 1.0, 2.0]])
    torch.testing.assert_close(weights("teacher_entropy", teacher_entropy=entropy), (-entropy).exp())
    torch.testing.assert_close(weights("teacher_entropy", {"nats": 2.0}, teacher_entropy=entropy), (-entropy / 2).exp())
    assert weights("position", {"tokens": 2}, position=torch.tensor([[0, 1, 2, 3]])).tolist() == [[1, 1, 0, 0]]


def test_every_weighting_has_its_source_and_no_weight_outside_of_zero_and_one():
    measured = {
        **{name: torch.rand(3, 5) * 3 for name in ("divergence", "student_entropy", "teacher_entropy")},
        "position": torch.arange(5).expand(3, 5),
    }
    previous = previous_of(**{name: value.flatten() for name, value in measured.items() if name != "position"})
    for name, function in WEIGHTINGS.items():
        assert "arXiv" in function.__doc__ or "this package" in function.__doc__
        found = weights(name, {"tokens": 3} if name == "position" else {}, **measured, previous=previous)
        assert ((found >= 0) & (found <= 1)).all()
        assert found.any()


def agree_twice(agreement, divergence, factor=2.0):
    return 1 + (factor - 1) * agreement * (divergence < 1)


def by_rows(divergence):
    return divergence / divergence.max().clamp(min=1e-9)


def by_length(position, mask):
    return (position < 0.5 * mask.sum(1, keepdim=True)).float()


def in_place(divergence):
    return divergence.clamp_(min=1)


REFUSED = {
    "an unknown name": ("caps", {}, "this version has cap, top_share"),
    "an unknown parameter": (
        "cap",
        {"nat": 0.3},
        "'nat', which the token weighting 'cap' does not take. Its parameters",
    ),
    "no number": ("cap", {"nats": "0.3"}, "must be a number above 0"),
    "a cap of 0": ("cap", {"nats": 0}, "must be a number above 0"),
    "more than all": ("top_share", {"share": 1.5}, r"must be a number in \(0, 1\]"),
    "no position": ("position", {}, "needs 'tokens'"),
    "a parameter that is not measured": (lambda divergence, log_q: log_q, {}, "needs 'log_q'"),
    "no tensor": (lambda divergence: 1.0, {}, "returned 1.0 for tokens"),
    "a mean": (lambda divergence: divergence.mean(), {}, r"a tensor of shape \(\)"),
    "negative": (lambda divergence: divergence - 1, {}, "finite and not negative"),
    "infinite": (lambda divergence: 1 / divergence, {}, "finite and not negative"),
    "an error": (lambda previous, mask: mask * previous.mean("divergence"), {}, "failed: AttributeError"),
    "in place": (in_place, {}, "changed its arguments in place"),
    "no module": ("no_such_module.f", {}, "could not be imported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_is_refused_with_the_settings(tmp_path, name):
    weighting, parameters, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config(tmp_path, token_weighting=weighting, token_weighting_kwargs=parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_weighting": "cap", "kl_estimator": "sampled"}, "up to a part that depends on the sampled token"),
        ({"token_weighting": "top_share", "kl_estimator": "topk"}, "Use kl_estimator='full'"),
        ({"token_weighting_kwargs": {"nats": 0.3}}, "there is no `token_weighting`"),
        ({"token_weighting": "cap", "beta": 0.0}, "`beta` is 0"),
        (
            {
                "token_weighting": "teacher_entropy",
                "kl_estimator": "topk",
                "teacher_server_urls": ["http://localhost:1"],
                "teacher_model_name_or_path": "teacher",
            },
            "takes the teacher's whole distribution",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(("function", "message"), [(by_rows, "other rows"), (by_length, "later tokens")])
def test_weights_that_are_no_function_of_the_prefix_are_a_warning(tmp_path, function, message, caplog):
    with caplog.at_level(logging.WARNING):
        config(tmp_path, token_weighting=function)
    assert message in caplog.text


def test_sound_weightings_give_no_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        for name in WEIGHTINGS:
            make_weighting(name, {"tokens": 3} if name == "position" else {})
        make_weighting(CustomWeighting("agree_twice", agree_twice), {"factor": 3.0})
    assert caplog.text == ""


def test_on_the_command_line_and_in_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_weights.py").write_text("def halved(mask, factor):\n    return factor * mask.float()\n")
    words = ["--output_dir", "out", "--use_cpu", "--bf16", "false"]
    _, args, _ = parsed([*words, "--token_weighting", "cap", "--token_weighting_kwargs", '{"nats": 0.3}'])
    assert (args.token_weighting, args.token_weighting_kwargs) == ("cap", {"nats": 0.3})
    (tmp_path / "run.yaml").write_text("token_weighting: own_weights.halved\ntoken_weighting_kwargs: {factor: 0.5}\n")
    _, args, _ = parsed([*words, "--config", "run.yaml"])
    weighting = make_weighting(args.token_weighting, args.token_weighting_kwargs)
    assert weighting(mask=torch.tensor([[True, False]])).tolist() == [[0.5, 0.0]]
    for copied in (copy.deepcopy(args), pickle.loads(pickle.dumps(args)), OPDConfig.from_grpo(args)):
        assert copied.token_weighting == "own_weights.halved"
        assert copied.token_weighting.function is args.token_weighting.function
