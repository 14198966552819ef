"""From scored completions to the finished folder: filters, selection, duplicates, human data, Parquet, card.

Everything here is a pure function of what lies in the work folder and of the settings. So it is done anew whenever it
was interrupted, and may be done again with other settings without asking any model.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...data.json_rows import BATCH, Columns, groups
from ..config import GenerateConfig
from ..images import as_row, as_stored, image_schema, names_of
from ..output.card import card
from ..output.counts import Skip, SkipFile, Stage
from ..output.parquet import write_parquet
from ..records import Candidate
from ..text import Text, flat
from ..work_folder import WorkFolder, dump, read_lines, write_json
from .candidates import CandidateReader
from .contamination import Benchmarks
from .dedup import Duplicates
from .difficulty import difficulty_folder
from .drafts import DraftReader, revision_fault, revision_pair
from .evolve import prompts_to_build, rewrite_fault
from .human import HUMAN, human_needed, mixed, read_human, text_of
from .ingest import Prompts, read_rows
from .judge_stages import Findings
from .language import language_fault
from .revise import revised_scores
from .select import difficulty_faults, filter_fault, pair_of, pair_row, selection_faults
from .variety import Variety, variety_notes


WITH_IMAGES = 50  # rows in memory at a time, where they have images


class DatasetBuilder:
    """
    Makes the dataset of what is finished in a work folder.

    Args:
        config (`GenerateConfig`): filters, selection, duplicates, human data.
        work (`WorkFolder`): with prompts, completions and scores.
        scores (`str`, *optional*): folder of the scores; `None` without a verifier.
        advance (`Callable[[], None]`): called after each chunk.
        benchmarks (`Benchmarks`, *optional*): with which rows must share no n-gram.
    """

    def __init__(
        self,
        config: GenerateConfig,
        work: WorkFolder,
        scores: str | None,
        advance: Callable[[], None],
        benchmarks: Benchmarks | None = None,
    ):
        self.config, self.work, self.scores, self.advance = config, work, scores, advance
        self.benchmarks, self.originals = benchmarks, Prompts(work)
        seeds = next(stage.kept for stage in self.originals.stages if stage.name == "equal prompts")
        self.variety = Variety(config.seed, seeds, self.originals.total, bool(config.evolve))
        model = config.difficulty_model
        measured = revised_scores(difficulty_folder(model), work.completions) if model else None
        drafts = DraftReader(config, work, scores) if config.revise else None
        read_scores = None if scores is None else revised_scores(scores, work.completions)
        self.drafts = drafts
        self.prompts = prompts_to_build(config, work)
        self.reader = CandidateReader(work, self.prompts, list(config.teachers), read_scores, measured, drafts)
        self.filtered, self.selected = Stage("filter", "completions"), Stage(f"keep {config.keep}", "completions")
        self.paired, self.unique = (
            Stage("pair", "completions" if config.revise else "prompts"),
            Stage("duplicates", "pairs" if config.pairs else "rows"),
        )
        self.by_difficulty = Stage("difficulty", self.unique.unit)
        self.human, self.mixed = Stage("read human data", "rows"), Stage("mix in human data", "rows")
        self.writers: Counter[str] = Counter()
        self.notes: list[str] = []
        self.findings = Findings()  # about the judge

    def build(self, settings: dict[str, Any], fingerprint: str) -> None:
        """
        Write the dataset to the folder "dataset" in the work folder.

        Args:
            settings (`dict`): what the card and `counts.json` list as settings.
            fingerprint (`str`): of everything that the rows depend on.

        Raises:
            ValueError: no row is left.
        """
        with self.work.folder("dataset") as folder:
            with SkipFile(folder / "skipped.jsonl") as self.skips:
                for skip in itertools.chain(self.prompts.skips(), self.findings.skips):
                    self.skips.add(skip)
                duplicates = Duplicates(folder / "duplicates.db", self.config.near_duplicates)
                rows, columns = self._rows(folder, duplicates)
                duplicates.close()
            if self.originals.images:
                total = write_parquet(folder / "data", map(as_stored, rows), image_schema(columns.schema), WITH_IMAGES)
            else:
                total = write_parquet(folder / "data", rows, columns.schema)
            for name in ("duplicates.db", "rows.jsonl", "human.jsonl"):
                (folder / name).unlink(missing_ok=True)
            self._check(total)
            self._describe(folder, total, settings, fingerprint)

    def _check(self, total: int) -> None:
        """That every stage accounts for its rows, and that some are left."""
        stages = self._stages()
        lost = [stage.name for stage in stages if not stage.adds_up]
        assert not lost, f"rows got lost in {lost}"
        if not total:
            raise ValueError(f"No row is left. {_where_they_went(stages)} Nothing is lost: {self._advice()}")
        made = next((stage.kept for stage in stages if stage.name == "new prompts"), 0)
        if made < self.config.new_prompts:
            self.notes.append(
                f"New prompts are {made}, not the {self.config.new_prompts} asked for: the teacher wrote nothing new "
                "any more."
            )

    def _describe(self, folder: Path, total: int, settings: dict[str, Any], fingerprint: str) -> None:
        """Write `counts.json` and the card."""
        if self.benchmarks and (skipped := self.benchmarks.too_short):
            self.notes.append(
                f"Of {skipped + self.benchmarks.used} benchmark rows, {skipped} have no text of "
                f"{self.benchmarks.short} words or more, so nothing was compared with them."
            )
        stages, writers, variety = self._stages(), dict(self.writers), self.variety.summary()
        self.notes += variety_notes(variety)
        counts = {
            "rows": total,
            "writers": writers,
            "stages": [stage.as_dict() for stage in stages],
            **self.findings.as_counts(),
            "variety": variety,
            "notes": self.notes,
            "settings": settings,
            "fingerprint": fingerprint,
        }
        write_json(folder / "counts.json", counts)
        skips = (Skip(**row) for row in read_lines(folder / "skipped.jsonl"))
        text = card(self.config, settings, stages, writers, skips, self.notes, variety)
        (folder / "README.md").write_text(text + self.findings.section(), encoding="utf-8")

    def _rows(self, folder: Path, duplicates: Duplicates) -> tuple[Iterator[dict[str, Any]], Columns]:
        """All rows of the dataset in their order, and their columns; both files are read one row at a time."""
        columns = Columns()
        count = _store(folder / "rows.jsonl", self._synthetic(duplicates), columns)
        if self.config.selects_by_difficulty:
            columns = Columns()
            count = self._select_by_difficulty(folder, columns)
        self.mixed.seen = self.mixed.kept = count
        if self.config.human_data is None:
            return self._counted(read_lines(folder / "rows.jsonl")), columns
        available = _store(folder / "human.jsonl", self._human(duplicates), columns)
        wanted = human_needed(count, self.config.human_share)
        take = min(wanted, available)
        self.mixed.seen, self.mixed.kept = count + available, count + take
        if available > take:
            self.mixed.dropped["human rows beyond their share"] = available - take
        if take < wanted:
            self.notes.append(
                f"Human rows are {take / max(count + take, 1):.1%} of all, not the {self.config.human_share:.1%} asked "
                f"for: that would take {wanted}, and there are {available}."
            )
        files = [read_lines(folder / name) for name in ("rows.jsonl", "human.jsonl")]
        return self._counted(mixed(files[0], count, files[1], available, take, self.config.seed)), columns

    def _counted(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            self.writers[row["chosen_teacher"] if self.config.pairs else row["teacher"]] += 1
            if row.get("teacher") != HUMAN:
                self.variety.add_row(row)
            yield row

    def _select_by_difficulty(self, folder: Path, columns: Columns) -> int:
        """Rewrite the file of rows with those that stay; how many there are."""
        name = "chosen_ifd" if self.config.pairs else "ifd"
        rows = folder / "rows.jsonl"
        faults = difficulty_faults([row[name] for row in read_lines(rows)], self.config)
        chosen = (row for row, fault in zip(read_lines(rows), faults, strict=True) if self.by_difficulty.count(fault))
        count = _store(folder / "selected.jsonl", chosen, columns)
        os.replace(folder / "selected.jsonl", rows)
        share = self.config.difficulty_keep
        if share is not None and count < (wanted := round(share * self.by_difficulty.seen)):
            self.notes.append(
                f"Rows selected by difficulty are {count}, not the {wanted} asked for: no others have an IFD below 1."
            )
        return count

    def _synthetic(self, duplicates: Duplicates) -> Iterator[dict[str, Any]]:
        for number in range(len(self.prompts)):
            for candidates in self.reader.read(number, self.skips):
                for row in self._selected(candidates):
                    if self.unique.count(duplicates.fault(*text_of(row), names_of(row["prompt"]))):
                        yield as_row(row) if self.originals.images else row
            self.variety.add_prompts(self.originals.chunk(number), self.prompts.chunk(number))
            self.advance()

    def _selected(self, candidates: list[Candidate]) -> Iterator[dict[str, Any]]:
        """Rows made of one prompt's completions."""
        config = self.config
        passed = [c for c in candidates if self.filtered.count(self._filter_fault(c))]
        if config.pairs and config.revise:
            for candidate in passed:
                draft_fault = self._filter_fault(candidate.draft) if candidate.draft else None
                if self.paired.count(revision_fault(candidate, draft_fault, config)) and candidate.draft:
                    yield revision_pair(candidate, candidate.draft, self.scores is not None)
            return
        if config.pairs:
            pair = pair_of(passed, config)
            if self.paired.count(pair if isinstance(pair, str) else None) and not isinstance(pair, str):
                yield pair_row(*pair)
            return
        for candidate, fault in zip(passed, selection_faults(passed, config), strict=True):
            if self.selected.count(fault):
                yield candidate.as_row(self.scores is not None)

    def _filter_fault(self, candidate: Candidate) -> str | None:
        """The first filter that a completion does not pass, or `None`."""
        fault, config = filter_fault(candidate, self.config), self.config
        if fault is None and config.evolve:
            fault = rewrite_fault(candidate)
        if fault is None and config.language:
            fault = language_fault(candidate.prompt, candidate.text, config.language)
        if fault is None and self.benchmarks:
            where = f"{flat(candidate.prompt)[:60]!r}, teacher {candidate.teacher}"
            fault = self._contamination(self.filtered, where, candidate.prompt, candidate.text)
        return fault

    def _contamination(self, stage: Stage, where: str, *texts: Text) -> str | None:
        """That one of these texts shares an n-gram with a benchmark, which is listed."""
        for text in texts:
            if self.benchmarks and (overlap := self.benchmarks.overlap(text)):
                self.skips.add(Skip(stage.name, where, overlap.detail))
                return overlap.reason
        return None

    def _human(self, duplicates: Duplicates) -> Iterator[dict[str, Any]]:
        assert self.config.human_data is not None
        for found in read_rows(self.config.human_data):
            row = read_human(found, self.prompts.text)
            fault = row if isinstance(row, str) else None
            if fault:
                self.skips.add(Skip(self.human.name, found.where, fault))
            elif isinstance(row, dict):
                fault = self._contamination(self.human, found.where, row["prompt"], row["completion"])
                fault = fault or duplicates.fault(*text_of(row))
            if self.human.count(fault) and isinstance(row, dict):
                self.variety.add_row(row, HUMAN)
                yield {**row, "teacher": HUMAN}

    def _stages(self) -> list[Stage]:
        """All stages that took part, in their order."""
        chosen = self.paired if self.config.pairs else self.selected
        stages = [
            *self.prompts.stages,
            self.reader.asked,
            *(self.drafts.stages if self.drafts else []),
            *self.findings.stages,
            self.reader.written,
            self.filtered,
            chosen,
            self.unique,
            *([self.by_difficulty] if self.config.selects_by_difficulty else []),
        ]
        return [*stages, self.human, self.mixed] if self.config.human_data else stages

    def _advice(self) -> str:
        return (
            f"the completions are in {self.work.path}. Loosen the filter or the selection and start again with "
            "the other settings as they were; no teacher is asked twice."
        )


def publish(work: WorkFolder, output_dir: Path) -> None:
    """Put the finished folder in its place; one that was there before is replaced."""
    replaced = work.path / "replaced"
    if output_dir.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(output_dir, replaced)
    os.rename(work.path / "dataset", output_dir)
    shutil.rmtree(replaced, ignore_errors=True)


def _store(path: Path, rows: Iterator[dict[str, Any]], columns: Columns) -> int:
    """Write rows to a file and note their columns; how many there were."""
    total = 0
    with open(path, "w", encoding="utf-8") as file:
        for group in groups(rows, BATCH):
            columns.add(group)
            file.writelines(dump(row) + "\n" for row in group)
            total += len(group)
    return total


def _where_they_went(stages: list[Stage]) -> str:
    dropped = [f"{stage.name}: {reason} ({n})" for stage in stages for reason, n in stage.dropped.items()]
    return f"Dropped were: {'; '.join(dropped)}." if dropped else ""
