"""The study of a pruned SmolLM2, on tiny models: what is left out, what is measured, what the page shows."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.studies.pretrained import report
from scripts.studies.pretrained.measure import compare
from scripts.studies.pretrained.models import leave_out, make_student, without
from scripts.studies.pretrained.prompts import correct, right


def tiny_llama(layers=4):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=40, num_hidden_layers=layers, initializer_range=0.3, eos_token_id=1, **sizes)
    return LlamaForCausalLM(config).eval()


WRITTEN = [([3, 4, 5], [6, 7, 8, 1]), ([9, 10], [11, 1]), ([3, 12, 13, 14], [15, 16, 17])]


def naive_log_probs(model):
    """Of each answer's tokens, one row at a time."""
    rows = []
    for prompt, completion in WRITTEN:
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
        rows.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    return torch.cat(rows)


@torch.no_grad()
def test_comparison_is_that_of_whole_logits():
    teacher = tiny_llama()
    student = without(teacher, (1,))
    ours, theirs = naive_log_probs(student), naive_log_probs(teacher)
    ids = torch.tensor([token for _, completion in WRITTEN for token in completion]).unsqueeze(1)
    found = compare(student, teacher, WRITTEN)
    expected = {
        "reverse_kl": (ours.exp() * (ours - theirs)).sum(1).mean(),
        "forward_kl": (theirs.exp() * (theirs - ours)).sum(1).mean(),
        "agreement": (ours.argmax(1) == theirs.argmax(1)).float().mean(),
        "teacher_nll": -theirs.gather(1, ids).mean(),
        "student_nll": -ours.gather(1, ids).mean(),
    }
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)


@torch.no_grad()
def test_the_layer_that_matters_least_is_left_out_first():
    teacher = tiny_llama()
    for weight in (teacher.model.layers[2].self_attn.o_proj.weight, teacher.model.layers[2].mlp.down_proj.weight):
        weight.mul_(1e-3)  # this layer hardly does anything
    assert leave_out(teacher, WRITTEN, 1) == (2,)
    assert compare(without(teacher, (2,)), teacher, WRITTEN)["forward_kl"] < 1e-3
    assert compare(without(teacher, (0,)), teacher, WRITTEN)["forward_kl"] > 1e-2


def test_recorded_layers_give_the_student_of_another_machine(tmp_path, tokenizer):
    teacher = tiny_llama()
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "pruning.json").write_text(json.dumps({"chosen": "one by one", "layers": {"one by one": [2]}}))
    path = make_student(tmp_path, tmp_path / "teacher", lambda: pytest.fail("layers are chosen again"))
    student = LlamaForCausalLM.from_pretrained(path)
    assert compare(student.eval(), without(teacher, (2,)), WRITTEN)["forward_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "kind", "word", "score"),
    [
        ('The first letter of the word "music" is "M".', "letter", "music", 1.0),
        ('The first letter of "music" is "s".', "letter", "music", 0.0),
        ("It begins well.", "letter", "it", 0.0),
        ("Music is played.", "sentence", "music", 1.0),
        ("Musicians play.", "sentence", "music", 0.0),
        ("The capital of France is Paris.", "capital", "France", 1.0),
        ("The capital of France is Lyon.", "capital", "France", 0.0),
    ],
)
def test_verifier(text, kind, word, score):
    assert right(text, kind, word) == score
    assert correct([[{"role": "assistant", "content": text}]], [kind], [word]) == [score]


def test_questions_without_a_verifier_have_no_score():
    assert correct(["anything"], ["meaning"], ["music"]) == [None]


def a_measurement(kl):
    accuracy = {"sentence": 0.5, "letter": 0.25, "capital": 0.125}
    numbers = {"reverse_kl": kl, "forward_kl": 1.0, "agreement": 0.5, "teacher_nll_of_own": 3.0, "length": 20.0}
    return {**numbers, "accuracy": accuracy, "samples": [f"answer | {i}" for i in report.SHOWN]}


def test_page_shows_every_finished_run(tmp_path):
    prompts = [f"Question {i}?" for i in report.SHOWN]
    before = {"student": a_measurement(2.0), "teacher": a_measurement(0.0), "prompts": prompts}
    (tmp_path / "before.json").write_text(json.dumps(before))
    line = {"step": 1, "distill/reverse_kl": 1.5, "grad_norm": 2.0}
    for name, kl in (
        ("on-policy-0", 0.5),
        ("on-policy-1", 0.7),
        ("distributions-0", 0.9),
        ("distributions-first-0", 0.8),
    ):
        one = {"final": a_measurement(kl), "curve": [[0, 2.0], [4, kl]], "log": [line], "seconds": 120}
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    page = tmp_path / "page.md"
    marks = [
        f"<!-- pretrained {name}: begin -->\nold\n<!-- pretrained {name}: end -->"
        for name in ("table", "samples", "log")
    ]
    page.write_text("\n\n".join(["# Title", *marks, "The end."]))
    labels = {"on-policy": "on-policy", "distributions": "soft", "sft": "SFT", "distributions-first": "both"}
    report.write(tmp_path, labels, page, tmp_path / "picture.png")
    text = page.read_text()
    assert "| on-policy | 0.60 (0.50–0.70) |" in text
    for told in ("| soft | 0.90 |", "| both | 0.80 |", "**Question 5?**", "answer \\| 5"):
        assert told in text
    for gone in ("SFT", "old"):
        assert gone not in text
    assert text.endswith("The end.")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_page_without_a_place_is_refused(tmp_path):
    (tmp_path / "before.json").write_text(
        json.dumps({"student": a_measurement(1), "teacher": a_measurement(0), "prompts": ["?"] * 6})
    )
    (tmp_path / "on-policy-0.json").write_text(
        json.dumps({"final": a_measurement(1), "curve": [[0, 1.0]], "log": [{"step": 1}], "seconds": 1})
    )
    page = tmp_path / "page.md"
    page.write_text("# Title")
    with pytest.raises(ValueError, match="has no place for 'table'"):
        report.write(tmp_path, {"on-policy": "on-policy"}, page, tmp_path / "picture.png")


def test_the_page_tells_the_means_of_the_results():
    docs = Path(__file__).parents[2] / "docs"
    page = " ".join((docs / "pretrained.md").read_text().split())
    runs = {
        arm: [
            json.loads(path.read_text())["final"]
            for path in sorted((docs / "results" / "pretrained").glob(f"{arm}-?.json"))
        ]
        for arm in ("on-policy", "distributions", "sft", "distributions-first")
    }
    reverse = {arm: f"{statistics.mean(one['reverse_kl'] for one in found):.2f}" for arm, found in runs.items()}
    assert (
        f"stays at {reverse['sft']} nats; with the distributions (`lmbda=0`) it is {reverse['distributions']}" in page
    )
    assert f"({reverse['on-policy']} against {reverse['distributions']})" in page
    assert f"ends at {reverse['distributions-first']}, the lowest of all" in page
    forward = [statistics.mean(one["forward_kl"] for one in runs[arm]) for arm in ("distributions", "on-policy")]
    assert f"({forward[0]:.2f} against {forward[1]:.2f})" in page
    capitals = [
        statistics.mean(one["accuracy"]["capital"] for one in runs[arm]) for arm in ("distributions", "on-policy")
    ]
    assert f"capitals, {100 * capitals[0]:.0f} % against {100 * capitals[1]:.0f} %" in page
