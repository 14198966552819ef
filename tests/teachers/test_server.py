"""A teacher behind a server: the local model's numbers over real HTTP, faults that pass, faults that do not."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from typing import Any

import pytest
import torch
from helpers import batch
from teacher_server import TeacherServer

from trl_distill import http_client
from trl_distill.errors import TeacherAnswerError, TeacherUnavailable
from trl_distill.rollouts import Rollouts
from trl_distill.signals import TokenLogProbs


SOON = 2.0  # seconds: the time-out of tests that wait for it


@pytest.fixture
def closed_url():
    """Nobody listens there."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


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
    assert time.monotonic() - start < 15  # half of `backoff`: no pause while there is another server to ask
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
    ("after", "longest", "least", "most"), [(0.4, 30, 0.4, 20), (3600, 0.2, 0.2, 20), ("soon", 30, 0, 20)]
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
    """Of two requests one is told to come back in 30 s, the other gets an answer that cannot be used."""
    server.fail("status", 1, (429, 30))
    server.alter = lambda answer: "no"
    start = time.monotonic()
    with pytest.raises(TeacherAnswerError, match="is not JSON"):
        ask(server.url, rows_per_request=3).score(rollouts)
    assert time.monotonic() - start < 25


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
