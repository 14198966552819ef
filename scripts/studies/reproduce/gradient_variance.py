"""How noisy is the gradient of each estimator and discount? Measured on the demo's models, one completion at a time.

    python -m scripts.studies.reproduce.gradient_variance \
        --students scripts/studies/tasks/models/student demo_output/student

For each student it samples completions, takes the gradient of every form of the teacher's term on each of them, and
reports the variance over completions (trace of the covariance) as a multiple of that of the exact KL at γ = 0. For
γ = 1 it also tries baselines, estimated on completions of their own: the mean future KL at each position, the mean of
seven other completions of the same prompt, and a regression at each position on functions of the prefix (the exact KL
of this token and of those before, the entropy). Writes `variance.json` and `variance.png`.

Left out: training. `python scripts/reproduce.py estimators` shows whether noise matters there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from scripts.studies.demo.student import MODELS, console, sample
from scripts.studies.tasks.additions import MAX_COMPLETION_LENGTH, problems
from trl_distill.foreign_text import in_legend
from trl_distill.objective.terms import future_kl, sampled_reverse_kl, sequence_term, term, topk_reverse_kl


TOP_K = (0, 1, 2, 4, 8, 16)


GROUP = 8


BASELINES = {
    "none": "γ = 1",
    "position": "γ = 1, mean at the position",
    "group": "γ = 1, mean of the prompt's others",
    "regression": "γ = 1, regression on the prefix",
}


class Pair:
    """A student and its teacher, and the log-probabilities that both give the tokens of sampled completions."""

    def __init__(self, folder: Path, teacher: Any, tokenizer: Any):
        self.student, self.teacher, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), teacher, tokenizer
        self.student.generation_config.pad_token_id = tokenizer.pad_token_id
        self.student.eval()

    def sample(self, prompts: list[Any]) -> dict[str, torch.Tensor]:
        ids, attention_mask, completions, mask = sample(self.student, self.tokenizer, prompts)
        return {"ids": ids, "attention_mask": attention_mask, "completions": completions, "mask": mask}

    def log_probs(self, rollouts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, C, V)` of student, with gradient, and teacher; the vocabulary is small here."""
        inputs = {"input_ids": rollouts["ids"], "attention_mask": rollouts["attention_mask"]}
        predicts = slice(-rollouts["mask"].shape[1] - 1, -1)
        log_q = self.student(**inputs).logits[:, predicts].log_softmax(-1)
        with torch.no_grad():
            log_p = self.teacher(**inputs).logits[:, predicts].log_softmax(-1)
        return log_q, log_p


def exact_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return (log_q.exp() * (log_q - log_p).detach()).sum(-1)


def features(log_q: torch.Tensor, log_p: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What a baseline may depend on at each position, `(B, C, 4)`: the prefix, not the next token."""
    kl = exact_kl(log_q, log_p).detach() * mask
    entropy = -(log_q.exp() * log_q).sum(-1).detach()
    return torch.stack([torch.ones_like(kl), kl, kl.cumsum(1) - kl, entropy], dim=-1)


def fit(pair: Pair, prompts: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients at each position, `(C, 4)`, of the mean alone and of the regression."""
    rollouts = pair.sample(prompts)
    mask = rollouts["mask"]
    with torch.no_grad():
        log_q, log_p = pair.log_probs(rollouts)
        known = features(log_q, log_p, mask)
        future = future_kl(known[..., 1], mask, 1.0)
    mean, regression = torch.zeros(MAX_COMPLETION_LENGTH, 4), torch.zeros(MAX_COMPLETION_LENGTH, 4)
    for t in range(mask.shape[1]):
        alive = mask[:, t]
        if alive.sum() < 8:
            continue
        x, y = known[alive, t], future[alive, t]
        mean[t, 0] = y.mean()
        regression[t] = torch.linalg.solve(x.T @ x + torch.eye(4), x.T @ y)
    return mean, regression


def forms(log_q: torch.Tensor, log_p: torch.Tensor, y: torch.Tensor, mask: torch.Tensor, expected: dict) -> dict:
    """Every form of the teacher's term, `(1, C)` each."""
    log_q_y, log_p_y = (x.gather(-1, y[..., None])[..., 0] for x in (log_q, log_p))
    ratio = torch.where(mask, log_q_y - log_q_y.detach(), 0.0).exp()
    exact = exact_kl(log_q, log_p)
    terms = {"full": exact, "sampled": sampled_reverse_kl(log_q_y, log_p_y, ratio)}
    for k in TOP_K:
        ids = log_q.detach().topk(k).indices
        head = (log_q.gather(-1, ids), log_p.gather(-1, ids))
        terms[f"topk {k}"] = topk_reverse_kl(*head, log_q_y, log_p_y, ~(ids == y[..., None]).any(-1), ratio)
    for discount in (0.5, 0.9):
        terms[f"γ = {discount}"] = sequence_term(exact, mask, ratio, discount)
    future = future_kl(exact, mask, 1.0)
    for name, label in BASELINES.items():
        terms[label] = term(exact, exact + ratio * (future - expected.get(name, 0.0)))
    return terms


def measure(pair: Pair, rows: int, seed: int) -> dict[str, float]:
    """Variance of each form's gradient over completions, as a multiple of that of the exact KL."""
    set_seed(seed)
    mean, regression = fit(pair, problems(512, seed=seed)[:]["prompt"])
    parameters = list(pair.student.parameters())
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, float] = {}
    for prompt in track(problems(rows, seed=seed + 1)[:]["prompt"], "measuring", console=console):
        group = pair.sample([prompt] * GROUP)
        with torch.no_grad():
            others = features(*pair.log_probs(group), group["mask"])[1:, :, 1]
        first = {name: tensor[:1] for name, tensor in group.items()}
        log_q, log_p = pair.log_probs(first)
        mask = first["mask"]
        known, length = features(log_q, log_p, mask), mask.shape[1]
        expected = {
            "position": (known * mean[:length]).sum(-1),
            "regression": (known * regression[:length]).sum(-1),
            "group": future_kl(others, group["mask"][1:], 1.0).sum(0) / group["mask"][1:].sum(0).clamp(min=1),
        }
        for name, per_token in forms(log_q, log_p, first["completions"], mask, expected).items():
            found = torch.autograd.grad((per_token * mask).sum(), parameters, retain_graph=True)
            gradient = torch.cat([g.flatten() for g in found]).double()
            sums[name] = sums.get(name, 0) + gradient
            squares[name] = squares.get(name, 0.0) + gradient.square().sum().item()
    variance = {name: squares[name] / rows - (sums[name] / rows).square().sum().item() for name in sums}
    return {name: value / variance["full"] for name, value in variance.items()}


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """Estimators on the left, horizons and baselines on the right; both from zero."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#1f5fa8", "#c05a00", "#3a7d44", "#7a3b8f")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", width_ratios=[1, 1.35])
    names = ["γ = 0.5", "γ = 0.9", *BASELINES.values()]
    height = 0.8 / len(results)
    for place, (student, variance) in enumerate(results.items()):
        left.plot(
            range(len(TOP_K)),
            [variance[f"topk {k}"] for k in TOP_K],
            marker="os^D"[place],
            color=colours[place],
            label=in_legend(student),
            clip_on=False,
        )
        offsets = [i + (place - (len(results) - 1) / 2) * height for i in range(len(names))]
        right.barh(offsets, [variance[name] for name in names], height, color=colours[place])
        for offset, name in zip(offsets, names, strict=True):
            right.annotate(f" {variance[name]:.3g}", (variance[name], offset), va="center", fontsize=8)
    most = max(variance[name] for variance in results.values() for name in names)
    left.set(ylabel="variance of the gradient", ylim=(0, None))
    left.set_xticks(range(len(TOP_K)), ["0: sampled", *map(str, TOP_K[1:])])
    left.set(xlabel="kl_top_k: ids that are exact", title="topk and sampled, γ = 0")
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="variance of the gradient", xlim=(0, 1.1 * most))
    right.set_title("full: later KL that is credited to a token, baselines", loc="right")
    right.invert_yaxis()
    for line in (left.axhline, right.axvline):
        line(1, color="#555555", linestyle="--", linewidth=1)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle("Noise of one completion's gradient, as a multiple of full at γ = 0 (dashed)")
    figure.legend(loc="outside lower center", ncols=len(results), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def in_words(results: dict[str, dict[str, float]]) -> str:
    """For those who do not see the picture."""
    shown = {"sampled": "topk 0", "top-4": "topk 4", **{name: name for name in ("γ = 0.9", *BASELINES.values())}}
    parts = [
        f"{label} {', '.join(f'{variance[name]:.3g} ({student})' for student, variance in results.items())}"
        for label, name in shown.items()
    ]
    return f"Variance of the gradient as a multiple of full at γ = 0. {'; '.join(parts)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=Path, nargs="+", default=[MODELS / "student"])
    parser.add_argument("--names", nargs="+", help="of the students in table and picture; their folders otherwise")
    parser.add_argument("--rows", type=int, default=256, help="completions per student")
    parser.add_argument("--output_dir", type=Path, default=Path("variance_output"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(MODELS / "teacher").eval()
    names = options.names or [str(folder) for folder in options.students]
    results = {
        name: measure(Pair(folder, teacher, tokenizer), options.rows, options.seed)
        for name, folder in zip(names, options.students, strict=True)
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "variance.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    draw(results, options.output_dir / "variance.png")
    table = Table(title=f"Variance of the gradient of one completion, full = 1 ({options.rows} completions)")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for form in results[names[0]]:
        table.add_row(form, *(f"{results[name][form]:.2f}" for name in names))
    console.print(table)
    console.print(f"Results are in {options.output_dir}: variance.json and variance.png")


if __name__ == "__main__":
    main()
