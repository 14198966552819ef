"""A divergence of one's own: what is taken, what is refused before the run, and that it trains like a built-in one."""

from __future__ import annotations

import copy
import functools
import json
import logging
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import VOCAB, config, make_model, relative_error

from trl_distill import OPDConfig, OPDTrainer
from trl_distill.cli.train import make_parser, parsed
from trl_distill.estimators import make_estimator
from trl_distill.heads import fused, tiles
from trl_distill.heads.lm_head import LMHead
from trl_distill.objective.custom import CustomDivergence, load_divergence
from trl_distill.objective.divergences import DIVERGENCES, as_one_class, summands
from trl_distill.signals import HiddenStates


STOPS = [1, 4, 7]


def total_variation(log_q, log_p):
    return (log_q.exp() - log_p.exp()).abs() / 2


def hellinger(log_q, log_p):
    return ((log_q / 2).exp() - (log_p / 2).exp()).square()


def difference(log_q, log_p):
    """Its gradient by `log_q` is a tensor of ones that autograd expands from one number."""
    return log_q - log_p


class Power:
    def __init__(self, power):
        self.power = power

    def __call__(self, log_q, log_p):
        return (log_q.exp() - log_p.exp()).abs() ** self.power


def of_power(power):
    def inner(log_q, log_p):
        return (log_q.exp() - log_p.exp()).abs() ** power

    return inner


NO_TENSOR, FORM, GRADIENT = "which is no tensor", "the sum over ids is taken later", "without a gradient"
REFUSED = {
    "one argument": (lambda log_q: log_q, "failed: TypeError"),
    "numpy": (lambda log_q, log_p: log_q.numpy(), "failed: RuntimeError"),
    "a list": (lambda log_q, log_p: log_q.tolist(), NO_TENSOR),
    "a class": (Power, "failed: TypeError"),
    "a sum": (lambda log_q, log_p: (log_q.exp() * (log_q - log_p)).sum(-1), FORM),
    "a mean": (lambda log_q, log_p: (log_q.exp() * (log_q - log_p)).mean(), FORM),
    "torch's own kl_div": (torch.nn.functional.kl_div, FORM),
    "detached": (lambda log_q, log_p: (log_q.exp() * (log_q - log_p)).detach(), GRADIENT),
    "without the student": (lambda log_q, log_p: log_p.exp(), GRADIENT),
    "NaN": (lambda log_q, log_p: (log_q - log_p).sqrt(), "returned nan"),
    "log of 0": (lambda log_q, log_p: (1 - log_q.exp()).log() - (1 - log_p.exp()).log(), "returned -?inf"),
    "infinite gradient at q = p": (lambda log_q, log_p: (log_q - log_p).abs().sqrt(), "a gradient that is NaN or inf"),
    "in place": (lambda log_q, log_p: log_q.exp() * (log_q - log_p.sub_(1)), "changed its arguments in place"),
    "normalised": (lambda log_q, log_p: log_q.softmax(-1) * (log_q - log_p), "if other ids or tokens are left out"),
    "centred over tokens": (lambda log_q, log_p: log_q - log_q.mean(0), "if other ids or tokens are left out"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("setting", ["divergence", "off_policy_divergence"])
def test_a_function_that_cannot_train_is_refused_with_the_settings(tmp_path, setting, name):
    function, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{setting: function})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "no_such_module.f"}, "could not be imported"),
        ({"divergence": "math.no_such_function"}, "could not be imported"),
        ({"divergence": "math.pi"}, "is no function, but 3.14"),
        ({"divergence": "total_variation"}, "or a function of your own by its import path"),
        ({"divergence": None}, "or a function of your own by its import path"),
        ({"divergence": hellinger, "kl_estimator": "topk"}, "Use kl_estimator='full'"),
        ({"divergence": hellinger, "kl_estimator": "sampled"}, "Use kl_estimator='full'"),
        ({"divergence": hellinger, "divergence_alpha": 0.5}, "has no parameter"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


WARNED = {
    "wrong sign": (lambda log_q, log_p: log_q.exp() * (log_p - log_q), "Is its sign right"),
    "cross-entropy": (lambda log_q, log_p: -log_p.exp() * log_q, "where student and teacher are equal, not 0"),
    "entropy": (lambda log_q, log_p: -log_q.exp() * log_q, "would not end at the teacher"),
    "no slope": (lambda log_q, log_p: log_q * 0, "the student may learn nothing"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_rarely_meant_is_a_warning(name, caplog):
    function, message = WARNED[name]
    with caplog.at_level(logging.WARNING):
        load_divergence(function)
    assert message in caplog.text


@pytest.mark.parametrize("function", [total_variation, hellinger], ids=lambda f: f.__name__)
def test_a_sound_function_is_taken_without_a_warning(function, caplog):
    with caplog.at_level(logging.WARNING):
        load_divergence(function)
        for name, alpha in DIVERGENCES.items():
            load_divergence(functools.partial(summands, name, alpha=alpha or 0.0))
    assert caplog.text == ""


def test_its_name_tells_functions_apart(tmp_path):
    where = __name__
    named = {
        f"{where}.hellinger": hellinger,
        f"{where}.Power()": Power(2),
        f"{where}.of_power.<locals>.inner": of_power(2),
        "trl_distill.objective.divergences.summands('jsd', alpha=0.3)": functools.partial(summands, "jsd", alpha=0.3),
    }
    for name, function in named.items():
        assert config(tmp_path, divergence=function).divergence == name
    two, three = (config(tmp_path, divergence=of_power(power)).divergence for power in (2, 3))
    log_q, log_p = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    gap = (log_q.exp() - log_p.exp()).abs()
    torch.testing.assert_close(summands(two, log_q, log_p), gap**2)
    torch.testing.assert_close(summands(three, log_q, log_p), gap**3)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the current directory."""
    (tmp_path / "own_formulas.py").write_text(
        "class Family:\n    @staticmethod\n    def distance(log_q, log_p):\n"
        "        return (log_q.exp() - log_p.exp()).abs()\n\n\ndistance = Family.distance\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["own_formulas.distance", "own_formulas:distance", "own_formulas.Family.distance"])
def test_an_import_path_on_the_command_line_and_in_yaml(module, path):
    words = ["--output_dir", "out", "--use_cpu", "--bf16", "false"]
    _, args, _ = parsed([*words, "--divergence", path])
    (module / "run.yaml").write_text(f"off_policy_divergence: {path}\nlmbda: 0.5\n")
    _, from_file, _ = parsed([*words, "--config", "run.yaml"])
    for found in (args.divergence, from_file.off_policy_divergence):
        assert isinstance(found, CustomDivergence)
        assert found == path.replace(":", ".")
        log_q, log_p = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.5, 0.5]).log()
        torch.testing.assert_close(found.function(log_q, log_p), torch.tensor([0.2, 0.2]))


@pytest.mark.parametrize("words", [["--divergence", "no_such.f"], ["--divergence", "math.pi"]])
def test_a_bad_path_ends_the_command_without_a_traceback(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(["--output_dir", "out", "--use_cpu", "--bf16", "false", *words])
    assert words[1] in f"{ended.value}{capsys.readouterr().err}"


def test_a_mistyped_name_ends_the_command_with_the_names(capsys):
    with pytest.raises(SystemExit):
        make_parser().options(["--output_dir", "out", "--divergence", "revers_kl"])
    assert "reverse_kl" in capsys.readouterr().err


def test_settings_are_saved_copied_and_read_again(tmp_path, module):
    own = config(tmp_path, divergence="own_formulas.distance", off_policy_divergence=of_power(2))
    saved = json.loads(own.to_json_string())
    assert saved["divergence"] == own.to_sanitized_dict()["divergence"] == "own_formulas.distance"
    for copied in (copy.copy(own), copy.deepcopy(own), own.resolved(False), OPDConfig.from_grpo(own)):
        assert copied.divergence.function is own.divergence.function
        assert copied.off_policy_divergence.function is own.off_policy_divergence.function
    again = pickle.loads(pickle.dumps(own))
    assert again.divergence.function is own.divergence.function
    assert type(again.off_policy_divergence) is str  # a closure cannot be imported
    with pytest.raises(ValueError, match="could not be imported"):
        OPDConfig.from_grpo(again)


def one_by_one(function, log_q, log_p):
    """With stop tokens summed first, as the definition of merging says."""
    others = [v for v in range(VOCAB) if v not in STOPS]
    log_q, log_p = (torch.cat([x[:, others], x[:, STOPS].logsumexp(-1, keepdim=True)], -1) for x in (log_q, log_p))
    return function(log_q, log_p).sum(-1)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("expected_slope", [False, True])
@pytest.mark.parametrize(
    "function", [total_variation, hellinger, difference, Power(2)], ids=lambda f: getattr(f, "__name__", "object")
)
def test_value_and_gradients_against_autograd_on_whole_logits(function, expected_slope, merged, monkeypatch):
    monkeypatch.setattr(tiles, "ON_CPU", replace(tiles.ON_CPU, tile=2 * VOCAB))
    monkeypatch.setattr("trl_distill.estimators.full.has_triton", lambda *_: True)  # no form that TRL's kernel has
    generator = torch.Generator().manual_seed(3)
    student, teacher = make_model("tied", seed=1), make_model("softcap", seed=2, hidden_size=24, vocab_size=VOCAB + 3)
    hidden = torch.randn(5, 16, generator=generator).requires_grad_()
    head, signal = LMHead(student), HiddenStates(torch.randn(5, 24, generator=generator), LMHead(teacher))
    weights = torch.rand(5, generator=generator)
    divergence = load_divergence(function)
    estimator = make_estimator("full", divergence, 0.7, 0, stops=STOPS if merged else None)
    slopes = fused.ExpectedSlopes(3 * weights) if expected_slope else None
    found = estimator.measure(hidden, head, signal, torch.zeros(5).long(), None, slopes).divergence
    log_q = (head.logits(hidden) / 0.7).log_softmax(-1)
    log_p = (signal.head.logits(signal.hidden)[:, :VOCAB] / 0.7).log_softmax(-1).detach()
    expected = one_by_one(function, log_q, log_p) if merged else function(log_q, log_p).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    leaves = [hidden, *(x for x in head.parameters() if x is not None)]
    ours = torch.autograd.grad((weights * found).sum(), leaves, retain_graph=True)
    naive = torch.autograd.grad((weights * expected).sum(), leaves)
    for a, b in zip(ours, naive, strict=True):
        assert relative_error(a, b) < 1e-4


def test_merged_classes_of_one_id_change_nothing():
    log_q, log_p = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    divergence = load_divergence(hellinger)
    value = summands(divergence, log_q, log_p).sum(-1)
    torch.testing.assert_close(as_one_class(value, log_q[:, 2:3], log_p[:, 2:3], divergence), value)


def trained(folder, divergence, student, teacher, prompts, tokenizer, resume=None, **changes):
    args = config(folder, divergence=divergence, max_steps=4, save_steps=2, save_strategy="steps", **changes)
    trainer = OPDTrainer(
        model=copy.deepcopy(student),
        teacher_model=copy.deepcopy(teacher),
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_equals_that_of_the_same_built_in_divergence(tmp_path, tokenizer, prompts, student, teacher):
    """Losses, weights and metrics, with merged stop tokens; a resumed run ends in the same weights."""
    teacher.generation_config.eos_token_id = [1, 5]
    rest = (student, teacher, prompts, tokenizer)
    built_in = trained(tmp_path / "built-in", "jsd", *rest)
    assert len(built_in.estimator.stops) == 2
    function = functools.partial(summands, "jsd", alpha=0.5)
    own = trained(tmp_path / "own", function, *rest)
    resumed = trained(tmp_path / "resumed", function, *rest, resume=str(tmp_path / "own" / "checkpoint-2"))
    for trainer in (own, resumed):
        for a, b in zip(trainer.model.parameters(), built_in.model.parameters(), strict=True):
            assert torch.equal(a, b)
    renamed = [
        {key.replace(own.args.divergence, "jsd"): value for key, value in row.items()} for row in own.state.log_history
    ]
    keys = [key for key in built_in.state.log_history[0] if "distill/" in key or key == "loss"]
    assert {"distill/jsd", "distill/jsd/quarter1", "distill/reverse_kl"} <= {*keys}
    for ours, theirs in zip(renamed[:4], built_in.state.log_history[:4], strict=True):
        assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
    read = torch.load(tmp_path / "own" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert read.divergence == own.args.divergence


def test_off_policy_batches_take_it_too(tmp_path, tokenizer, student, teacher):
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "a b c", "completion": " d e f <eos>"}] * 16)
    runs = [
        trained(
            tmp_path / str(i), "reverse_kl", student, teacher, rows, tokenizer, lmbda=0.0, off_policy_divergence=one
        )
        for i, one in enumerate(["forward_kl", functools.partial(summands, "forward_kl")])
    ]
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(a, b)
    assert any(
        "distill/off_policy/trl_distill.objective.divergences.summands('forward_kl')" in key
        for key in runs[1].state.log_history[0]
    )


def test_the_plot_of_a_run_shows_it():
    pytest.importorskip("matplotlib")
    from trl_distill.reporting.curves import training_figure

    names = ["my_module.distance", "my.summands('jsd', alpha=0.3)"]
    log = [{"step": i, **{f"distill/{name}": float(i) for name in names}, "distill/jsd/a.b": 1.0} for i in range(3)]
    (panel,) = [axis for axis in training_figure({"run": log}).axes if axis.get_title(loc="left")]
    assert panel.get_title(loc="left") == "divergence that is minimised"
    assert [[*line.get_ydata()] for line in panel.lines] == [[0.0, 1.0, 2.0]] * 2
