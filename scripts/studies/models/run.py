"""Which families of causal models hold, of all that the installed transformers has; docs/models.md is made from it.

    python -m scripts.studies.models.run                        # all families, about two minutes on one core
    python -m scripts.studies.models.run llama qwen3_moe        # these, shown and not kept
    python -m scripts.studies.models.run --write_docs           # all, into docs/results/models/ and docs/models.md
    python -m scripts.studies.models.run --page_only            # the page again, from what was kept

Tiny random models in fp32 on a CPU, with a stand-in for FlashAttention; nothing is fetched.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

from scripts.studies.startup import ONE_THREAD, prepare_environment


prepare_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=ONE_THREAD)

import logging

from rich.console import Console
from rich.progress import track

from scripts.studies.models.families import FAILS, FamilyResult, probe
from scripts.studies.models.page import PAGE, RESULTS, Results, page
from scripts.studies.models.tiny import FAMILIES


def run(families: list[str], console: Console) -> list[FamilyResult]:
    """Probe families, and show those that do not hold."""
    logging.getLogger("trl_distill").setLevel(logging.ERROR)  # of random models there is much to warn about
    found = []
    for family in track(families, "families", console=console, transient=True):
        found.append(probe(family))
        if found[-1].reason:
            console.print(f"{family}: {found[-1].outcome}: {found[-1].reason}", markup=False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="`model_type` of configurations; all unless given")
    parser.add_argument("--write_docs", action="store_true", help="keep the results and write docs/models.md")
    parser.add_argument("--page_only", action="store_true", help="run nothing; write docs/models.md")
    options = parser.parse_args()
    unknown = sorted(set(options.families) - set(FAMILIES))
    if unknown:
        parser.error(f"transformers {version('transformers')} has no causal model of: {', '.join(unknown)}")
    if options.families and (options.write_docs or options.page_only):
        parser.error("The page has all families: name none with --write_docs or --page_only.")
    if not options.page_only:
        found = run(options.families or list(FAMILIES), Console())
        if options.write_docs:
            Results.of(found).save(RESULTS)
    if options.write_docs or options.page_only:
        PAGE.write_text(page(Results.load(RESULTS)))
    elif any(result.outcome == FAILS for result in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
