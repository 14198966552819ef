"""A [`TokenTable`] as one self-contained HTML file: data as JSON, a style sheet, and a script.

Text from models is in the JSON only and is shown as text, never as markup. A content security policy allows only the
style sheet and script made here, by their hashes, and thumbnails in data URIs if prompts have images. The script is in
the three `.js` files.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import string
from dataclasses import asdict
from importlib import resources
from typing import Any

from .table import Opinion, TokenTable, View, curve, summary


SCRIPTS = ("data.js", "cards.js", "sidebar.js")  # concatenated in this order, in one scope


THUMBNAILS = 400_000  # characters of all thumbnails in a report; further images are named only


_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def page(table: TokenTable) -> str:
    """
    The report as HTML.

    Raises:
        ValueError: there are no completions.
    """
    if not table.completions:
        raise ValueError("There are no completions to report on. Give at least one prompt.")
    data = data_of(table)
    css = _part("report.css")
    js = '(() => {\n"use strict";\n' + "\n".join(_part(name) for name in SCRIPTS) + "})();\n"
    return string.Template(_part("report.html")).substitute(
        title=html.escape(table.title),
        css=css,
        css_hash=_hash(css),
        js=js,
        js_hash=_hash(js),
        images="; img-src data:" if data["pictures"] else "",
        data=embedded(data),
    )


def _part(name: str) -> str:
    return (resources.files(__package__) / name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(data: Any) -> str:
    """JSON for use inside of a `<script>` element, with characters escaped that could end it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be written to a file
    return text.translate(_ESCAPES)


def data_of(table: TokenTable) -> dict[str, Any]:
    """The data for the script; numbers are rounded, and NaN and infinity become `null`."""
    students = range(len(table.students))
    pictures = _thumbnails(table)
    return {
        "title": table.title,
        "teacher": table.teacher,
        "students": table.students,
        "labels": {str(token): text for token, text in table.labels.items()},
        "settings": table.settings,
        "summaries": [_rounded(asdict(summary(table.completions, student))) for student in students],
        "own": [_rounded(asdict(own)) for own in table.own],
        "pictures": list(pictures),
        "curves": [[_rounded(asdict(p)) for p in curve(table.completions, student)] for student in students],
        "rows": [
            {
                "prompt": row.prompt,
                "ids": row.ids,
                "texts": row.texts,
                "truncated": row.truncated,
                "reward": _rounded(row.reward),
                "rewards": _rounded(row.rewards),
                "teacher": _opinion(row.teacher),
                "views": [_opinion(view) for view in row.views],
                "spans": [list(vars(span).values()) for span in row.spans],
                "pictures": [[one.alt, one.width, one.height, pictures.get(one.uri)] for one in row.pictures],
            }
            for row in table.completions
        ],
    }


def _thumbnails(table: TokenTable) -> dict[str, int]:
    """The thumbnails that the page holds, each once, with their numbers; no more than `THUMBNAILS` characters."""
    found: dict[str, int] = {}
    left = THUMBNAILS
    for one in (picture for row in table.completions for picture in row.pictures):
        if one.uri and one.uri not in found and len(one.uri) <= left:
            found[one.uri] = len(found)
            left -= len(one.uri)
    return found


def _opinion(opinion: Opinion) -> dict[str, Any]:
    found: dict[str, Any] = {
        "logp": _rounded(opinion.log_probs),
        "top": [[[token for token, _ in top], _rounded([p for _, p in top])] for top in opinion.top],
    }
    if isinstance(opinion, View):
        found |= {"kl": _rounded(opinion.kl), "fkl": _rounded(opinion.forward_kl)}
    return found


def _rounded(value: Any) -> Any:
    """Floats with four significant digits or four decimals, whichever is more; NaN and infinity as `None`."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else float(f"{value:.4g}") if abs(value) < 1 else round(value, 4)
    return value
