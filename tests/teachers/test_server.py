"""A teacher behind a server: the local model's numbers over real HTTP, faults that pass, faults that do not."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import re
import socket
import time
from typing import Any

import pytest
import torch
from helpers import VOCAB, batch, make_model
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from teacher_server import TeacherServer

from trl_distill import http_client
from trl_distill.errors import TeacherAnswerError, TeacherUnavailable
from trl_distill.rollouts import Rollouts
from trl_distill.signals import TokenLogProbs
from trl_distill.teachers import answer_arrays
from trl_distill.teachers.answer_arrays import Row, TokenScores, read_good_answer
from trl_distill.teachers.server import ServedTeacher
from trl_distill.teachers.server_answers import _read_carefully, read_answer


SOON = 2.0  # seconds: the time-out of tests that wait for it


@pytest.fixture(scope="module")
def model():
    return make_model(seed=2)


@pytest.fixture
def server(model):
    with TeacherServer(model) as server:
        yield server


@pytest.fixture
def closed_url():
    """Nobody listens there."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.fixture
def ask():
    """Makes teachers with short time-outs, and closes them."""
    teachers = []

    def make(urls: Any, name: str = "teacher", top_k: int = 0, **changes: Any) -> ServedTeacher:
        teachers.append(ServedTeacher(urls, name, top_k, **{"timeout": 20, "backoff": 0.01, **changes}))
        return teachers[-1]

    yield make
    for teacher in teachers:
        teacher.close()


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    """Padding on both sides, holes in the mask, and two of seven rows without judged tokens."""
    inputs = batch(rows=7)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][1, 2:4] = 0
    inputs["tool_mask"][3, 0] = 0
    inputs["tool_mask"][0] = inputs["tool_mask"][5] = 0
    return Rollouts.from_inputs(inputs)


@torch.no_grad()
def expected(model: Any, rollouts: Rollouts, top_k: int) -> TokenLogProbs:
    """From one padded forward."""
    length = rollouts.mask.shape[1]
    logits = model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits
    log_p = logits[:, -length - 1 : -1].log_softmax(-1)[rollouts.mask]  # (N, V)
    tokens = rollouts.input_ids[:, -length:][rollouts.mask]  # (N,)
    top = log_p.topk(top_k)
    return TokenLogProbs(log_p.gather(1, tokens[:, None])[:, 0], top.indices, top.values)


def assert_same(found: TokenLogProbs, wanted: TokenLogProbs) -> None:
    torch.testing.assert_close(found.log_p, wanted.log_p, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.top_log_p, wanted.top_log_p, atol=1e-5, rtol=0)
    assert torch.equal(found.top_ids, wanted.top_ids)


# What comes back


@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("rows_per_request", [1, 2, 16])
def test_gives_the_log_probs_of_the_local_model(model, server, ask, rollouts, top_k, rows_per_request):
    found = ask(server.url, top_k=top_k, rows_per_request=rows_per_request).score(rollouts)
    assert found.top_ids.shape == (rollouts.mask.sum(), top_k)
    assert_same(found, expected(model, rollouts, top_k))


def test_sends_rows_with_judged_tokens_without_padding(server, ask, rollouts):
    ask(server.url, rows_per_request=1).score(rollouts)
    kept = [index for index in range(7) if index not in (0, 5)]
    wanted = [rollouts.input_ids[index][rollouts.attention_mask[index].bool()].tolist() for index in kept]
    assert sorted(body["prompt"][0] for body in server.asked) == sorted(wanted)


def test_nothing_to_judge_is_no_request(server, ask, rollouts):
    found = ask(server.url, top_k=3).score(
        Rollouts(rollouts.input_ids, rollouts.attention_mask, torch.zeros_like(rollouts.mask))
    )
    assert (found.log_p.shape, found.top_ids.shape, found.top_log_p.shape) == ((0,), (0, 3), (0, 3))
    assert server.count == 0


def test_works_while_an_event_loop_runs(model, server, ask, rollouts):
    async def inside() -> TokenLogProbs:
        return ask(server.url, top_k=2).score(rollouts)

    assert_same(asyncio.run(inside()), expected(model, rollouts, 2))


def test_sends_the_key_and_takes_urls_with_and_without_v1(server, ask, rollouts):
    teacher = ask([server.url, server.url + "/", server.url + "/v1", server.url + "/v1/"], api_key="secret")
    assert teacher.urls == [server.url + "/v1"]
    teacher.score(rollouts)
    assert server.headers["Authorization"] == "Bearer secret"


# Several servers


def test_spreads_over_the_servers(model, server, ask, rollouts):
    with TeacherServer(model) as other:
        found = ask([server.url, other.url], top_k=2, rows_per_request=1).score(rollouts)
        assert sorted([server.count, other.count]) == [2, 3]
    assert_same(found, expected(model, rollouts, 2))


def test_a_dead_server_is_made_up_for_and_then_avoided(model, server, ask, rollouts, closed_url):
    teacher = ask([closed_url, server.url], backoff=30)
    start = time.monotonic()
    for _ in range(3):
        assert_same(teacher.score(rollouts), expected(model, rollouts, 0))
    assert time.monotonic() - start < 5  # no pause while there is another server to ask
    assert list(teacher._client._failed) == [closed_url + "/v1"]
    assert all(teacher._client.in_turn(teacher._next_urls())[0] == server.url + "/v1" for _ in range(4))


# Faults that pass


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("fault", "value"),
    [("drop", None), ("break", None), ("stall", None), ("status", 500), ("status", 503), ("status", (429, 0.05))],
)
def test_a_passing_fault_changes_nothing(model, server, ask, rollouts, fault, value, times):
    server.fail(fault, times, value)
    timeout = SOON if fault == "stall" else 20
    found = ask(server.url, top_k=2, rows_per_request=3, timeout=timeout).score(rollouts)
    assert server.count >= 2 + times
    assert_same(found, expected(model, rollouts, 2))


@pytest.mark.parametrize(
    ("after", "longest", "least", "most"), [(0.4, 30, 0.4, 2), (3600, 0.2, 0.2, 2), ("soon", 9, 0, 2)]
)
def test_retry_after_is_respected_up_to_a_limit(server, ask, rollouts, monkeypatch, after, longest, least, most):
    monkeypatch.setattr(http_client, "LONGEST_PAUSE", longest)
    server.fail("status", 1, (429, after))
    start = time.monotonic()
    ask(server.url).score(rollouts)
    assert least <= time.monotonic() - start < most


# Faults that do not


@pytest.mark.parametrize(
    ("fault", "value", "named"),
    [("drop", None, "RemoteProtocolError"), ("stall", None, "ReadTimeout"), ("status", 500, "HTTP 500: told to fail")],
)
def test_a_lasting_fault_is_reported_with_what_was_tried(server, ask, rollouts, fault, value, named):
    server.fail(fault, value=value)
    with pytest.raises(TeacherUnavailable) as error:
        ask(server.url, retries=2, rows_per_request=16, timeout=SOON).score(rollouts)
    assert server.count == 3
    for part in (server.url, "tried 3 times", " s. ", named, "`timeout` (now 2 s)", "`retries` (now 2)"):
        assert part in str(error.value)


def test_all_servers_dead(ask, rollouts, closed_url):
    with pytest.raises(TeacherUnavailable, match=re.escape(closed_url) + ".*ConnectError"):
        ask(closed_url, retries=1).score(rollouts)


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({"name": "other"}, 6, r"HTTP 404: The model `other` does not exist\."),
        ({"top_k": 21}, 6, "prompt logprobs of 21.*`--max-logprobs`"),
        ({}, 70, "maximum context length is 64.*`--max-model-len`"),
    ],
)
def test_a_refusal_is_not_repeated_and_says_what_to_change(server, ask, changes, length, message):
    with pytest.raises(TeacherAnswerError, match=message):
        ask(server.url, **changes).score(Rollouts.from_inputs(batch(2, completion=length)))
    assert server.count == 1


@pytest.mark.parametrize(("fault", "message"), [("cut", "is not JSON"), ("shuffle", "row 1, position 1, token")])
def test_a_wrong_answer_is_not_repeated(server, ask, rollouts, fault, message):
    server.fail(fault)
    with pytest.raises(TeacherAnswerError, match=f"{server.url}/v1/completions cannot be used: .*{message}"):
        ask(server.url, rows_per_request=16).score(rollouts)
    assert server.count == 1


ERRORS = {  # with status 200; whether another attempt is made, and what is raised if it stays
    "overloaded": ({"error": {"message": "overloaded", "code": 503}}, True, TeacherUnavailable),
    "a rate limit as text": (
        {"error": {"message": "overloaded", "code": "429"}, "choices": None},
        True,
        TeacherUnavailable,
    ),
    "without a status": ({"error": "overloaded"}, True, TeacherAnswerError),
    "beside choices": ({"error": {"message": "overloaded"}, "choices": []}, True, TeacherAnswerError),
    "as an object": ({"object": "error", "message": "overloaded", "code": 500}, True, TeacherUnavailable),
    "that lasts": ({"error": {"message": "overloaded", "code": 400}}, False, TeacherAnswerError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_inside_a_good_status_is_said_and_passes_if_it_may(model, server, ask, rollouts, name):
    inside, passes, error = ERRORS[name]
    left = [inside]
    server.alter = lambda answer: left.pop() if left else answer
    if passes:
        assert_same(ask(server.url, rows_per_request=16).score(rollouts), expected(model, rollouts, 0))
        assert server.count == 2
    server.count, server.alter = 0, lambda answer: inside
    with pytest.raises(error, match="it holds an error: overloaded"):
        ask(server.url, retries=1, rows_per_request=16).score(rollouts)
    assert server.count == 1 + passes


def test_an_error_inside_one_server_is_made_up_for_by_another(model, server, ask, rollouts):
    server.alter = lambda answer: {"error": {"message": "overloaded", "code": 503}}
    with TeacherServer(model) as other:
        assert_same(ask([server.url, other.url], backoff=30).score(rollouts), expected(model, rollouts, 0))


def test_an_error_inside_comes_with_advice_and_without_the_key(server, ask, rollouts, caplog):
    message = "requested 60 logprobs, max allowed: 20, by Bearer top-secret"
    server.alter = lambda answer: {"error": {"message": message}}
    with pytest.raises(TeacherAnswerError, match="`--max-logprobs`") as error:
        ask(server.url, retries=1, api_key="top-secret").score(rollouts)
    assert "top-secret" not in f"{error.value} {caplog.text}"


@pytest.mark.parametrize("odd", [{"choices": None}, {"choices": [None]}, {"choices": []}, {}, {"error": None}])
def test_parts_that_are_missing_are_named(server, ask, rollouts, odd):
    server.alter = lambda answer: {"model": "teacher", **odd}
    with pytest.raises(TeacherAnswerError, match=r"choices|choice 0"):
        ask(server.url, rows_per_request=16).score(rollouts)


def test_an_error_ends_the_waiting_of_other_requests(server, ask, rollouts):
    """Of two requests one is told to come back in 20 s, the other gets an answer that cannot be used."""
    server.fail("status", 1, (429, 20))
    server.alter = lambda answer: "no"
    start = time.monotonic()
    with pytest.raises(TeacherAnswerError, match="is not JSON"):
        ask(server.url, rows_per_request=3).score(rollouts)
    assert time.monotonic() - start < 5


def test_nothing_is_asked_after_close(server, ask, rollouts):
    teacher = ask(server.url)
    teacher.close()
    with pytest.raises(RuntimeError, match="closed"):
        teacher.score(rollouts)


# What cannot be asked


@pytest.mark.parametrize(
    ("urls", "changes", "message"),
    [
        ([], {}, "`urls` is empty"),
        ("localhost:8000", {}, "in full"),
        ("http://", {}, "in full"),
        ("http://localhost", {"top_k": -1}, "cannot be negative"),
        ("http://localhost", {"timeout": 0}, "must be positive"),
    ],
)
def test_settings_without_a_meaning_are_refused(ask, urls, changes, message):
    with pytest.raises(ValueError, match=message):
        ask(urls, **changes)


def test_padding_and_a_first_token_cannot_be_judged(server, ask, rollouts):
    with pytest.raises(ValueError, match="marks padding"):
        ask(server.url).score(Rollouts(rollouts.input_ids, rollouts.attention_mask, torch.ones_like(rollouts.mask)))
    without_prompt = rollouts.attention_mask.clone()
    without_prompt[2, :4] = 0
    with pytest.raises(ValueError, match="Row 2: its first token is judged"):
        ask(server.url).score(Rollouts(rollouts.input_ids, without_prompt, rollouts.mask))


# Before training


def test_check_passes_and_asks_for_what_score_will_ask_for(server, ask):
    ask(server.url, top_k=20).check()
    assert server.asked[0]["prompt_logprobs"] == 20


def test_check_lists_the_models_served(server, ask):
    with pytest.raises(ValueError, match=r"does not serve `model='other'` but \['teacher'\]"):
        ask(server.url, name="other").check()


def test_check_finds_a_server_that_gives_too_few_log_probs(server, ask):
    with pytest.raises(TeacherAnswerError, match=r"greater than max allowed: 20.*`--max-logprobs`"):
        ask(server.url, top_k=21).check()


def test_check_needs_one_server_that_answers(server, ask, closed_url, caplog):
    with pytest.raises(TeacherUnavailable, match=closed_url):
        ask(closed_url, retries=1).check()
    ask([closed_url, server.url], retries=1).check()
    assert f"without one of the teacher's servers. No answer from the teacher at {closed_url}" in caplog.text


def test_check_refuses_an_answer_under_another_name(server, ask):
    """As a vLLM server with several names gives."""
    server.alter = lambda answer: {**answer, "model": "first"}
    with pytest.raises(TeacherAnswerError, match=r"from the model 'first', but 'teacher' was requested.*its first"):
        ask(server.url).check()


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
    key = draw(st.sampled_from(list(entry)))
    rename(entry, key, "HERE")
    return json.dumps(answer).replace('"HERE":', f'"{key}": {json.dumps(entry["HERE"])}, "{key}":')


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
    texts = ['":', '"logprob":', "\\", '\\":', "logprob", "٣", "\n"]
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
