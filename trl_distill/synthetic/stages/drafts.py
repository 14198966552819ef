"""What completions were before they were revised: read back for the dataset, and paired with their revisions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import GenerateConfig
from ..output.counts import Stage
from ..records import AspectScores, Candidate, PromptAnswer, PromptScores, Score
from ..text import as_completion
from ..work_folder import WorkFolder, read_lines
from .revise import Revision, count_revision, revise_stages
from .select import is_correct, pair_row


class ChunkDrafts:
    """
    The drafts of one teacher's completions in a chunk.

    Args:
        reader (`DraftReader`, *optional*): with the settings and counts; `None` where nothing is revised.
        revisions (`dict[int, list[Revision]]`, *optional*): by prompt.
        scores (`dict[int, list[Score]]`, *optional*): of the drafts, by prompt.
    """

    def __init__(
        self,
        reader: DraftReader | None = None,
        revisions: dict[int, list[Revision]] | None = None,
        scores: dict[int, list[Score]] | None = None,
    ):
        self.reader, self.revisions, self.scores = reader, revisions or {}, scores or {}

    def count(self, answer: PromptAnswer) -> None:
        """Count an answer's completions in all rounds."""
        if self.reader is not None:
            for revision in self.revisions[answer.id]:
                count_revision(self.reader.stages, revision)

    def attach(self, candidate: Candidate, prompt: int, i: int) -> Candidate:
        """The candidate with what is to be known about its draft; `i` is its number among those of its prompt."""
        if self.reader is None:
            return candidate
        config, revision = self.reader.config, self.revisions[prompt][i]
        columns, draft = candidate.columns, None
        if config.pairs and revision.draft is not None:
            score = self.scores[prompt][i] if self.scores else None
            value, aspects = (score.score, score.aspects) if isinstance(score, AspectScores) else (score, {})
            text, reason = revision.draft.text, revision.draft.stop_reason
            known = value if isinstance(value, float) else None
            draft = Candidate(candidate.prompt, text, reason, candidate.teacher, known, columns, aspects)
        if config.keep_drafts:
            columns = {**columns, **revision.columns()}
            shown = columns.pop("draft")
            if not config.pairs:  # there it is the rejected one
                columns["draft"] = None if shown is None else as_completion(shown, candidate.prompt)
        return replace(candidate, columns=columns, draft=draft)


class NoDrafts:
    """In place of a [`DraftReader`] where nothing is revised."""

    def chunk(self, number: int, index: int) -> ChunkDrafts:
        """No drafts."""
        return ChunkDrafts()


class DraftReader:
    """
    Reads drafts, and counts what was revised.

    Args:
        config (`GenerateConfig`): whether pairs are made, and which columns are kept.
        work (`WorkFolder`): with the revisions.
        scores (`str`, *optional*): folder of the drafts' scores; `None` without a verifier.

    Attributes:
        stages (`list[Stage]`): one for each round.
    """

    def __init__(self, config: GenerateConfig, work: WorkFolder, scores: str | None):
        self.config, self.work, self.scores = config, work, scores
        self.stages: list[Stage] = revise_stages(config)

    def chunk(self, number: int, index: int) -> ChunkDrafts:
        """The drafts of the teacher with this index in a chunk."""
        lines = read_lines(self.work.chunk(self.work.completions, index, number))
        revisions = {line["id"]: [Revision.from_dict(one) for one in line["revisions"]] for line in lines}
        if self.scores is None or not self.config.pairs:
            return ChunkDrafts(self, revisions)
        scores = map(PromptScores.from_dict, read_lines(self.work.chunk(self.scores, index, number)))
        return ChunkDrafts(self, revisions, {one.id: one.scores for one in scores})


def revision_fault(revision: Candidate, draft_fault: str | None, config: GenerateConfig) -> str | None:
    """
    Why a revision makes no pair with its draft, or `None`.

    Args:
        revision (`Candidate`): that passed the filters.
        draft_fault (`str`, *optional*): the first filter that the draft does not pass.
        config (`GenerateConfig`): whether there is a verifier, and what counts as correct.
    """
    draft = revision.draft
    if draft is None:
        return "not revised"
    if draft_fault:
        return f"draft: {draft_fault}"
    if not config.verifies:
        return None
    if draft.score is None or revision.score is None:
        return "draft without a score"
    if revision.score <= draft.score:
        return "revision scores no higher than the draft"
    if config.keep == "correct" and not is_correct(revision, config):
        return f"no score of {config.correct_from:g} or more"
    if config.keep == "correct" and is_correct(draft, config):
        return f"no score below {config.correct_from:g}"
    return None


def revision_pair(revision: Candidate, draft: Candidate, scored: bool) -> dict[str, Any]:
    """The row of a preference dataset: the revision is chosen, the draft rejected."""
    row = pair_row(revision, draft)
    return row if scored else {name: value for name, value in row.items() if not name.endswith("_score")}
