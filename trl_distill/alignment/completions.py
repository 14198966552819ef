"""One completion in the student's and in the teacher's tokens: where both begin anew, and which tokens leave the path.

Everything that is decided before a token is decided from the tokens before it. So neither an exact sum at such a
position nor what is left out of a token's credit depends on the token, and the gradient is unbiased whatever the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .text_tokenizer import TextTokenizer
from .vocabularies import Vocabularies


WINDOW = 128  # bytes at the end of a text that are tokenised again when it grows, back to the next start of a word


@dataclass(frozen=True)
class Place:
    """The teacher's tokens up to a position: the first `count` of path number `path`."""

    path: int
    count: int


@dataclass(frozen=True)
class AlignedCompletion:
    """
    A completion of n tokens of the student, without its stop token.

    Spans lie between positions at which both tokenizations begin anew. The last one ends with the stop token. If the
    completion was cut, what follows the last such position belongs to no whole span: its tokens may become other ones.

    Attributes:
        paths (`list` of `list[int]`): the teacher's tokens. The first are those of the text, up to the end of the last
            whole span; the others those of beginnings of the text, whose tokens changed as the text went on.
        starts (`list[int]`): the student's positions at which spans begin, the last of which may not be whole. Rising,
            the first is 0; position n is the stop token's.
        places (`list` of [`Place`]): the teacher's tokens before each of them, and at last before `end`.
        end (`int`): the student's position after the last whole span; n + 1 behind a stop token.
        single (`list[bool]`): for each of `starts`, whether the span is one shared token, or the stop token.
        charged (`list[bool]`): whether a token left the student's canonical path; n of them.
        common (`list[int]`): for each of `paths`, how many tokens at its beginning are those of the first.
    """

    paths: list[list[int]]
    starts: list[int]
    places: list[Place]
    end: int
    single: list[bool]
    charged: list[bool]
    common: list[int]


def align(pair: Vocabularies, ids: Sequence[int], stopped: bool, window: int | None = WINDOW) -> AlignedCompletion:
    """
    Align a completion.

    Args:
        pair ([`~trl_distill.alignment.vocabularies.Vocabularies`]): the tokenizers.
        ids (`Sequence[int]`): the student's tokens, without the stop token.
        stopped (`bool`): whether a stop token follows; else the completion was cut.
        window (`int`, *optional*): bytes at the end of the text that are tokenised again with each token; `None` for
            all of it, which takes quadratic time and is done where the window turns out to be too small.

    Returns:
        [`AlignedCompletion`].
    """
    try:
        return _Aligner(pair, list(ids), window).run(stopped)
    except _WindowTooSmall:
        return _Aligner(pair, list(ids), None).run(stopped)


class _WindowTooSmall(Exception):
    pass


class _Growing:
    """A text that grows, with its ids in one tokenizer: only the last words are tokenised again."""

    def __init__(self, tokenizer: TextTokenizer, window: int | None):
        self.tokenizer, self.window = tokenizer, window
        self.ids: list[int] = []
        self.ends: list[int] = []  # of each token, in bytes
        self.kept = 0  # tokens that cannot change any more

    def spelled(self, text: bytes) -> list[int] | None:
        """The new ids behind the first `kept` for the grown text; `None` if they do not have its bytes."""
        start = self.ends[self.kept - 1] if self.kept else 0
        ids = self.tokenizer.encode(text[start:].decode())
        return ids if self.tokenizer.text_bytes(ids) == text[start:] else None

    def take(self, ids: list[int], text: bytes) -> None:
        """Go on with these ids behind the first `kept`."""
        del self.ids[self.kept :], self.ends[self.kept :]
        for i in ids:
            self.ids.append(i)
            self.ends.append((self.ends[-1] if self.ends else 0) + len(self.tokenizer.piece(i) or b""))
        if self.window is not None:
            self._keep(text, self.window)

    def _keep(self, text: bytes, window: int) -> None:
        """Keep all tokens before the last start of a word that is `window` bytes back."""
        for keep in range(len(self.ids) - 1, self.kept, -1):
            start = self.ends[keep - 1]
            if start <= len(text) - window and _begins_word(text, start):
                self.kept = keep
                return

    def is_whole(self, text: bytes) -> bool:
        """Whether the ids are those of the whole text, tokenised at once."""
        return self.tokenizer.encode(text.decode()) == self.ids


def _begins_word(text: bytes, at: int) -> bool:
    """Whether a single space, before and behind which there is none, begins at a byte."""
    return text[at : at + 1] == b" " and not text[at - 1 : at].isspace() and not text[at + 1 : at + 2].isspace()


class _Aligner:
    """
    Goes through a completion from left to right.

    The text is cut into pieces, each of which is canonical. A new piece begins after an added token, and where a token
    left the canonical path. The teacher reads the pieces one after the other, each in its own canonical tokens.
    """

    def __init__(self, pair: Vocabularies, ids: list[int], window: int | None):
        self.pair, self.ids, self.window = pair, ids, window
        self.done: list[int] = []  # the teacher's tokens of finished pieces
        self.charged = [False] * len(ids)
        self.starts = [0]
        self.seen: list[tuple[int, list[int]]] = [(0, [])]  # at each start: tokens that stay, and those behind them
        self._begin(0)

    def _begin(self, at: int) -> None:
        self.begin = self.whole = at  # positions: of the piece, and after its last whole character
        self.text = b""
        self.lengths: list[int] = []  # of each token, in bytes
        self.student, self.teacher = _Growing(self.pair.student, self.window), _Growing(self.pair.teacher, self.window)

    def run(self, stopped: bool) -> AlignedCompletion:
        for at in range(len(self.ids)):
            self._add(at)
            if self._begins_anew(at + 1):
                self.starts.append(at + 1)
                kept = self.teacher.kept
                self.seen.append((len(self.done) + kept, self.teacher.ids[kept:]))
        if stopped:
            self._finish(len(self.ids))
            return self._result(self.done, len(self.ids) + 1, stopped)
        self._check_window()
        base, tail = self.seen[-1]
        text, end = (self.done + self.teacher.ids)[:base] + tail, self.starts[-1]
        if end == len(self.ids):  # no span is left open
            self.starts.pop()
            self.seen.pop()
        return self._result(text, end, stopped)

    def _result(self, text: list[int], end: int, stopped: bool) -> AlignedCompletion:
        paths, places, common = [text], [], [len(text)]
        for base, tail in self.seen:
            count = base + len(tail)
            if text[base:count] == tail:
                places.append(Place(0, count))
                continue
            both = zip([*tail, None], [*text[base:], None], strict=False)
            same = next(i for i, (own, new) in enumerate(both) if own != new)
            paths.append(text[:base] + tail)
            common.append(base + same)
            places.append(Place(len(paths) - 1, count))
        places.append(Place(0, len(text)))
        single = []
        for number, start in enumerate(self.starts):
            until = self.starts[number + 1] if number + 1 < len(self.starts) else end
            before, after = places[number], places[number + 1]
            one = until == start + 1 and before.path == after.path == 0
            if start == len(self.ids):
                single.append(one and after.count == before.count)
            else:
                shared = self.pair.shared.get(self.ids[start])
                single.append(one and text[before.count : after.count] == [shared] and until <= len(self.ids))
        return AlignedCompletion(paths, self.starts, places, end, single, self.charged, common)

    def _add(self, at: int) -> None:
        """Go on by one token of the student."""
        token = self.ids[at]
        piece = self.pair.student.bytes_of[token] if token < len(self.pair.student) else None
        if piece is None:
            self._add_special(at, token)
            return
        self.text += piece
        self.lengths.append(len(piece))
        whole = _whole(self.text)
        if whole is None or (whole == len(self.text) and not self._take(at) and not self._may_be_white_space(at)):
            self._leave(at)

    def _may_be_white_space(self, at: int) -> bool:
        """Whether what comes decides: the last space of several belongs to the word that follows, if one does."""
        behind = self.text[sum(self.lengths[: self.whole - self.begin]) :]
        before = self.text[: len(self.text) - len(behind)]
        return behind.decode().isspace() and (not before or before[-1:].isspace() or at > self.whole)

    def _add_special(self, at: int, token: int) -> None:
        """An added token: by its content one of the teacher's, or its content as text. Both begin anew after it."""
        self._finish(at)
        content = self.pair.student.added.get(token)
        if content is None:
            self.charged[at] = True  # a row of the embedding without a token
        elif content in self.pair.teacher.id_of_added:
            self.done.append(self.pair.teacher.id_of_added[content])
        else:
            self.done += self.pair.teacher.encode(content)
        self._begin(at + 1)

    def _take(self, at: int) -> bool:
        """Go on with the piece up to `at`, if it is canonical for the student and can be written by the teacher."""
        own = self.student.spelled(self.text)
        if own != self.ids[self.begin + self.student.kept : at + 1]:
            return False
        theirs = self.teacher.spelled(self.text)
        if theirs is None:
            return False
        self.student.take(own, self.text)
        self.teacher.take(theirs, self.text)
        self.whole = at + 1
        return True

    def _leave(self, at: int) -> None:
        """The token at `at` left the path: it is charged, and a piece begins with the character that it ends."""
        self.charged[at] = True
        count, begin = self.whole - self.begin, self.whole
        text, lengths = self.text[sum(self.lengths[:count]) :], self.lengths[count:]
        self._check_window()
        self.done += self.teacher.ids
        self._begin(begin)
        self.text, self.lengths = text, lengths
        if _whole(text) != len(text) or not self._take(at):  # not canonical by itself either
            self.done += self.pair.teacher.encode(text.decode("utf-8", "replace"))
            self._begin(at + 1)

    def _finish(self, at: int) -> None:
        """End the piece before position `at`; bytes that are no whole character are charged."""
        rest = self.text[sum(self.lengths[: self.whole - self.begin]) :]
        self._check_window()
        self.done += self.teacher.ids
        if rest:
            self.charged[at - 1] = True
            self.done += self.pair.teacher.encode(rest.decode("utf-8", "replace"))
        self._begin(at)

    def _check_window(self) -> None:
        text = self.text[: sum(self.lengths[: self.whole - self.begin])]
        if self.teacher.kept and not (self.teacher.is_whole(text) and self.student.is_whole(text)):
            raise _WindowTooSmall

    def _begins_anew(self, at: int) -> bool:
        """
        Whether both tokenizations begin anew at position `at`, as far as the tokens before it tell.

        They do after a finished piece. Else the teacher's last token must begin at a boundary of the student, and must
        not be about to go on; a space at the end may belong to the word that follows.
        """
        if self.whole != at:
            return False
        if not self.teacher.ids:
            return True
        if self.text[-1:] == b" ":
            return False
        length = self.teacher.ends[-1] - (self.teacher.ends[-2] if len(self.teacher.ends) > 1 else 0)
        count = 0
        while length > 0 and count < len(self.lengths):
            count += 1
            length -= self.lengths[-count]
        return length == 0 and tuple(self.ids[at - count : at]) not in self.pair.unfinished


def _whole(text: bytes) -> int | None:
    """How many bytes of a text are whole characters; `None` if it is no beginning of UTF-8."""
    try:
        return len(text.decode().encode())
    except UnicodeDecodeError as error:
        return error.start if error.reason == "unexpected end of data" and error.end == len(text) else None
