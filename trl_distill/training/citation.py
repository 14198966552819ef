"""The papers that the model card of a trained student cites."""

from __future__ import annotations

import textwrap


PAPER = {
    "title": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    "id": "2306.13649",
    "citation": textwrap.dedent("""\
        @inproceedings{agarwal2024onpolicy,
            title        = {{On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes}},
            author       = {Rishabh Agarwal and Nino Vieillard and Yongchao Zhou and Piotr Stanczyk and Sabela Ramos and Matthieu Geist and Olivier Bachem},
            year         = 2024,
            booktitle    = {The Twelfth International Conference on Learning Representations},
            eprint       = {arXiv:2306.13649},
        }
        @inproceedings{gu2024minillm,
            title        = {{MiniLLM: Knowledge Distillation of Large Language Models}},
            author       = {Yuxian Gu and Li Dong and Furu Wei and Minlie Huang},
            year         = 2024,
            booktitle    = {The Twelfth International Conference on Learning Representations},
            eprint       = {arXiv:2306.08543},
        }"""),
}
