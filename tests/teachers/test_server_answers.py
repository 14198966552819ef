"""Answers of servers: read fast and with care to the same numbers; what does not fit the question is never a number."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from helpers import VOCAB
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from teacher_server import TeacherServer

from trl_distill.errors import TeacherAnswerError
from trl_distill.rollouts import Rollouts
from trl_distill.teachers import answer_arrays
from trl_distill.teachers.answer_arrays import Row, TokenScores, read_good_answer
from trl_distill.teachers.server_answers import _read_carefully, read_answer


# Answers that do not fit the question: each corruption takes (draw, answer) and changes it, or returns text

K = 3


ROWS = [Row(2, [5, 9, 7, 3, 12, 8], [3, 5]), Row(4, [6, 20, 11, 4], [1, 2, 3]), Row(7, [13, 2, 14, 10, 19], [4])]


CORRUPTIONS: dict[str, Any] = {}


def corruption(function: Any) -> Any:
    CORRUPTIONS[function.__name__] = function
    return function


def pick_choice(draw, answer):
    return draw(st.sampled_from(answer["choices"]))


def pick_entry(draw, answer):
    """The entry of any position but the first of any choice."""
    return draw(st.sampled_from(pick_choice(draw, answer)["prompt_logprobs"][1:]))


def pick_log_prob(draw, answer):
    return draw(st.sampled_from(list(pick_entry(draw, answer).values())))


def rename(entry, old, new):
    items = [(new if key == old else key, value) for key, value in entry.items()]
    entry.clear()
    entry.update(items)


@corruption
def positions_shifted(draw, answer):
    entries = pick_choice(draw, answer)["prompt_logprobs"]
    by = draw(st.integers(1, len(entries) - 2))
    entries[1:] = entries[1 + by :] + entries[1 : 1 + by]


@corruption
def positions_swapped(draw, answer):
    entries = pick_choice(draw, answer)["prompt_logprobs"]
    i, j = draw(st.lists(st.integers(0, len(entries) - 1), min_size=2, max_size=2, unique=True))
    entries[i], entries[j] = entries[j], entries[i]


@corruption
def position_missing(draw, answer):
    entries = pick_choice(draw, answer)["prompt_logprobs"]
    del entries[draw(st.integers(0, len(entries) - 1))]


@corruption
def position_repeated(draw, answer):
    entries = pick_choice(draw, answer)["prompt_logprobs"]
    i = draw(st.integers(0, len(entries) - 1))
    entries.insert(i, entries[i])


@corruption
def position_of_another_type(draw, answer):
    entries = pick_choice(draw, answer)["prompt_logprobs"]
    entries[draw(st.integers(1, len(entries) - 1))] = draw(st.sampled_from([None, {}, [], "", 0, -1.5, True]))


@corruption
def first_position_with_an_entry(draw, answer):
    entries = pick_choice(draw, answer)["prompt_logprobs"]
    entries[0] = draw(st.sampled_from([entries[1], {}, 0, False, ""]))


@corruption
def log_prob_is_no_number(draw, answer):
    values = [math.nan, math.inf, -math.inf, None, "-1.0", True, False, [], {}, -(10**400), 10**400]
    pick_log_prob(draw, answer)["logprob"] = draw(st.sampled_from(values))


@corruption
def log_prob_overflows(draw, answer):
    pick_log_prob(draw, answer)["logprob"] = "HERE"
    return json.dumps(answer).replace('"HERE"', draw(st.sampled_from(["1e999", "-1e999", "1e400"])))


@corruption
def log_prob_positive(draw, answer):
    pick_log_prob(draw, answer)["logprob"] = draw(st.floats(1e-3, 1e300))


@corruption
def log_prob_of_a_judged_token_minus_infinity(draw, answer):
    """As vLLM writes it."""
    number = draw(st.integers(0, len(ROWS) - 1))
    entry = answer["choices"][number]["prompt_logprobs"][draw(st.sampled_from(ROWS[number].judged))]
    worst = max(entry.values(), key=lambda value: value["rank"])
    worst["logprob"] = -9999.0


@corruption
def log_probs_do_not_fall_with_the_rank(draw, answer):
    entry = list(pick_entry(draw, answer).values())
    one, two = draw(st.lists(st.sampled_from(entry), min_size=2, max_size=2, unique_by=id))
    one["logprob"], two["logprob"] = two["logprob"], one["logprob"]


@corruption
def mass_above_one(draw, answer):
    entry = pick_entry(draw, answer)
    total = draw(st.floats(1.01, len(entry)))
    for value in entry.values():
        value["logprob"] = math.log(total / len(entry))


@corruption
def another_token_first(draw, answer):
    entry = pick_entry(draw, answer)
    other = draw(st.integers(0, 200_000))
    if str(other) in entry:
        reject()
    rename(entry, next(iter(entry)), str(other))


@corruption
def token_not_first(draw, answer):
    entry = pick_entry(draw, answer)
    first = next(iter(entry))
    entry[first] = entry.pop(first)


@corruption
def no_token_id(draw, answer):
    entry = pick_entry(draw, answer)
    key = draw(st.sampled_from(list(entry)))
    rename(entry, key, draw(st.sampled_from(["-" + key, " " + key, "0" + key, key + ".0", "", "a", "٣", "9" * 30])))


@corruption
def rank_broken(draw, answer):
    entry = pick_entry(draw, answer)
    value = draw(st.sampled_from([value for value in entry.values() if value["rank"] <= K]))
    value["rank"] = draw(st.sampled_from([None, "1", 0, -1, 1.0, True, [], value["rank"] + 1, value["rank"] + 40]))


@corruption
def id_missing(draw, answer):
    entry = pick_entry(draw, answer)
    del entry[draw(st.sampled_from(list(entry)))]


@corruption
def id_too_many(draw, answer):
    entry = pick_entry(draw, answer)
    ranks = [*(value["rank"] for value in entry.values()), K + 1, 90]
    entry["777"] = {"logprob": -60.0, "rank": draw(st.sampled_from(ranks)), "decoded_token": ""}


@corruption
def id_without_its_fields(draw, answer):
    entry = pick_entry(draw, answer)
    key = draw(st.sampled_from(list(entry)))
    field = draw(st.sampled_from(["logprob", "rank", None]))
    if field:
        del entry[key][field]
    else:
        entry[key] = draw(st.sampled_from([None, -1.0, [-1.0, 1], "x"]))


@corruption
def another_model(draw, answer):
    answer["model"] = draw(st.sampled_from(["student", "", None, 1, ["teacher"]]))


@corruption
def cut(draw, answer):
    text = json.dumps(answer)
    return text[: draw(st.integers(0, len(text) - 1))]


@corruption
def not_the_json_of_an_answer(draw, answer):
    text = json.dumps(answer)
    others = ["[]", "null", "3", "{}", '{"error": {"message": "x"}}', "<html>", text + text, text + "x", "[" * 100_000]
    return draw(st.sampled_from(others))


@corruption
def a_key_stands_twice(draw, answer):
    entry = pick_entry(draw, answer)
    holder = draw(st.sampled_from([answer, pick_choice(draw, answer), entry, *entry.values()]))
    key = draw(st.sampled_from(list(holder)))
    rename(holder, key, "HERE")
    first, second = draw(st.lists(st.sampled_from(["", " ", "\t", "  ", "\n\r"]), min_size=2, max_size=2))
    twice = f'"{key}"{first}: {json.dumps(holder["HERE"])}, "{key}"{second}:'
    return json.dumps(answer).replace('"HERE":', twice)


@corruption
def choice_missing(draw, answer):
    del answer["choices"][draw(st.integers(0, 2))]


@corruption
def choice_too_many(draw, answer):
    extra = copy.deepcopy(pick_choice(draw, answer))
    extra["index"] = draw(st.integers(0, 3))
    answer["choices"].insert(draw(st.integers(0, 3)), extra)


@corruption
def choice_repeated(draw, answer):
    i, j = draw(st.permutations(range(3)))[:2]
    answer["choices"][i] = {**answer["choices"][j], "index": draw(st.sampled_from([i, j]))}


@corruption
def choices_of_another_type(draw, answer):
    if draw(st.booleans()):
        answer["choices"] = draw(st.sampled_from([None, {}, "", 3, dict(enumerate(answer["choices"]))]))
    else:
        answer["choices"][draw(st.integers(0, 2))] = draw(st.sampled_from([None, [], "", 0]))


@corruption
def choice_with_another_index(draw, answer):
    choice = pick_choice(draw, answer)
    choice["index"] = draw(st.sampled_from([None, "0", -1, 3, choice["index"] + 1, float(choice["index"])]))


@corruption
def choices_with_swapped_indexes(draw, answer):
    one, two = draw(st.permutations(answer["choices"]))[:2]
    one["index"], two["index"] = two["index"], one["index"]
    if draw(st.booleans()):
        answer["choices"].sort(key=lambda choice: choice["index"])


@corruption
def choices_with_swapped_contents(draw, answer):
    one, two = draw(st.permutations(answer["choices"]))[:2]
    one["prompt_logprobs"], two["prompt_logprobs"] = two["prompt_logprobs"], one["prompt_logprobs"]


@corruption
def nothing_about_the_prompt(draw, answer):
    name = draw(st.sampled_from(["prompt_logprobs", "prompt_token_ids"]))
    pick_choice(draw, answer)[name] = draw(st.sampled_from([None, [], {}, "", 0]))


@corruption
def another_prompt_echoed(draw, answer):
    echo = pick_choice(draw, answer)["prompt_token_ids"]
    i = draw(st.integers(0, len(echo) - 1))
    echo[i] = draw(st.sampled_from([echo[i] + 1, float(echo[i]), str(echo[i]), None, -echo[i]]))


@pytest.fixture(scope="module")
def answer(model) -> str:
    """A good answer about `ROWS`."""
    with TeacherServer(model) as server:
        body = {"model": "teacher", "prompt": [row.ids for row in ROWS], "prompt_logprobs": K, "max_tokens": 1}
        return json.dumps(server.answer({**body, "return_token_ids": True})[1])


@torch.no_grad()
def test_a_good_answer_is_read(model, answer):
    found = read_answer(answer, ROWS, "teacher", K).log_p.tolist()
    wanted = [
        model(input_ids=torch.tensor([row.ids])).logits[0, position - 1].log_softmax(-1)[row.ids[position]].item()
        for row in ROWS
        for position in row.judged
    ]
    assert found == pytest.approx(wanted, abs=1e-5)


def test_an_impossible_token_that_is_not_judged_does_no_harm(answer):
    changed = json.loads(answer)
    worst = max(changed["choices"][0]["prompt_logprobs"][1].values(), key=lambda value: value["rank"])
    worst["logprob"] = -9999.0
    assert_equal(read_answer(json.dumps(changed), ROWS, "teacher", K), read_answer(answer, ROWS, "teacher", K))


def assert_equal(found: TokenScores | None, wanted: TokenScores) -> None:
    assert found is not None
    for name in ("log_p", "top_ids", "top_log_p"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()


@pytest.fixture(params=["orjson", "json"])
def parser(request, monkeypatch):
    if request.param == "orjson":
        pytest.importorskip("orjson")
    monkeypatch.setattr(answer_arrays, "_loads", __import__(request.param).loads)


@pytest.mark.parametrize(("asked", "kept"), [(1, 0), (1, 1), (K, K), (28, 28)])
@pytest.mark.parametrize("spaced", [False, True])
def test_a_good_answer_is_read_at_once_as_with_care(parser, model, asked, kept, spaced):
    """Whatever the tokens say: quotation marks, colons and names of fields count as text."""
    texts = ['":', '"logprob":', "\\", '\\":', "logprob", "٣", "\n", " :", 'a" :', "a :"]
    with TeacherServer(model, max_logprobs=VOCAB) as server:
        body = {"model": "teacher", "prompt": [row.ids for row in ROWS], "prompt_logprobs": asked, "max_tokens": 1}
        good = server.answer({**body, "return_token_ids": True})[1]
    for number, value in enumerate(v for c in good["choices"] for e in c["prompt_logprobs"][1:] for v in e.values()):
        value["decoded_token"] = texts[number % len(texts)]
    content = json.dumps(good, separators=(", ", ": ") if spaced else (",", ":")).encode()
    assert_equal(read_good_answer(content, ROWS, "teacher", kept), _read_carefully(content, ROWS, "teacher", kept))


def test_an_unusual_answer_is_read_with_care(answer):
    """Python code for each alternative, but the same numbers: a space before the colon."""
    changed = answer.replace('":', '" :')
    assert read_good_answer(changed, ROWS, "teacher", K) is None
    assert_equal(read_answer(changed, ROWS, "teacher", K), read_answer(answer, ROWS, "teacher", K))


def test_rows_without_scores():
    """One token, of which nothing is said; and no row at all."""
    choice = {"index": 0, "prompt_token_ids": [5], "prompt_logprobs": [None]}
    for rows, choices in (([Row(0, [5], [])], [choice]), ([], [])):
        found = read_answer(json.dumps({"model": "teacher", "choices": choices}), rows, "teacher", K)
        assert found.log_p.shape == (0,)
        assert found.top_ids.shape == found.top_log_p.shape == (0, K)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_corruption_becomes_a_number(parser, name, answer):
    @settings(max_examples=30, deadline=None, database=None)
    @given(data=st.data())
    def each(data):
        broken = json.loads(answer)
        text = CORRUPTIONS[name](data.draw, broken)
        content = text if isinstance(text, str) else json.dumps(broken)
        assert read_good_answer(content, ROWS, "teacher", K) is None
        with pytest.raises(TeacherAnswerError):
            read_answer(content, ROWS, "teacher", K)

    each()


def test_no_corruption_becomes_a_number_over_http(server, ask):
    input_ids = torch.zeros(len(ROWS), 6, dtype=torch.long)
    attention_mask, mask = torch.zeros_like(input_ids), torch.zeros(len(ROWS), 5, dtype=torch.bool)
    for index, row in enumerate(ROWS):
        input_ids[index, : len(row.ids)] = torch.tensor(row.ids)
        attention_mask[index, : len(row.ids)] = 1
        mask[index, [position - 1 for position in row.judged]] = True
    rollouts, teacher, good = Rollouts(input_ids, attention_mask, mask), ask(server.url, top_k=K), []
    server.alter = lambda answer: good.append(answer) or answer
    teacher.score(rollouts)

    @settings(max_examples=40, deadline=None, database=None)
    @given(data=st.data(), corrupt=st.sampled_from(list(CORRUPTIONS.values())))
    def each(data, corrupt):
        broken = copy.deepcopy(good[0])
        text = corrupt(data.draw, broken)
        server.alter = lambda answer: broken if text is None else text
        with pytest.raises(TeacherAnswerError):
            teacher.score(rollouts)

    each()
