"""Sums as prompts, a teacher that solves them with errors, and a verifier of its answers."""

from __future__ import annotations


REWARD = """
def right(completions, answer, **kwargs):
    return [float(c.split()[-1:] == [a]) if a != "?" else None for c, a in zip(completions, answer, strict=True)]
"""


def solve(prompt, seed, model):
    """'1 + 2 =' -> 'steps ... 3', one in four wrong."""
    if "New task:" in prompt:
        return f"New task: And what is {seed % 1000} + {seed % 77} ="
    left, right = prompt.split()[-4], prompt.split()[-2]
    total = int(left) + int(right) + (seed % 4 == 0)
    return f"{model} adds {left} to {right}, seed {seed % 3}, and gets {total}"


def problems(count, start=0):
    return [{"prompt": f"What is {i} + {2 * i} =", "answer": str(3 * i)} for i in range(start, start + count)]


def by_stage(counts):
    return {stage["stage"]: stage for stage in counts["stages"]}
