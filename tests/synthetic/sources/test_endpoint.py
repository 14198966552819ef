"""Endpoints: what is asked, what is tried again, what concerns one prompt and what concerns all."""

from __future__ import annotations

import pytest
from chat_server import ChatServer

from trl_distill import TeacherAnswerError, TeacherUnavailable
from trl_distill.synthetic.address import Address
from trl_distill.synthetic.records import Completion, Refusal
from trl_distill.synthetic.sources.base import Sampling
from trl_distill.synthetic.sources.endpoint import Endpoint, EndpointSource


CHAT = [[{"role": "user", "content": word}] for word in ("a", "b", "c")]


@pytest.fixture
def server():
    with ChatServer(lambda text, seed: f"{text} {seed}") as server:
        yield server


def source(server, n=1, options=None, **settings):
    address = Address("endpoint", "m", server.url)
    return EndpointSource(Endpoint(address, backoff=0.001, **settings), Sampling(n, 7, 0.5, 0.9), options)


def test_chat_and_text(server):
    assert source(server).complete(CHAT, 3) == [[Completion(f"{w} {3 + i}", "stop")] for i, w in enumerate("abc")]
    assert source(server).complete(["a"], 3) == [[Completion("a 3", "stop")]]
    assert server.asked[-1] == {
        **{"model": "m", "prompt": "a", "n": 1, "seed": 3, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9}
    }


def test_options_are_merged_and_null_takes_out(server):
    options = {"max_tokens": None, "max_completion_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}}
    source(server, options=options).complete(CHAT[:1], 0)
    body = server.asked[-1]
    assert "max_tokens" not in body
    assert (body["max_completion_tokens"], body["chat_template_kwargs"]) == (9, {"enable_thinking": False})


def test_a_server_that_gives_one_completion_is_asked_again(server):
    server.at_most = 1
    found = source(server, n=3).complete(CHAT[:1], 0)[0]
    assert len({completion.text for completion in found}) == 3
    assert [body["n"] for body in server.asked] == [3, 2, 1]


def test_length_and_other_reasons_to_stop(server):
    for reason in ("length", "content_filter"):
        server.finish_reason = reason
        assert source(server).complete(CHAT[:1], 0)[0][0].stop_reason == reason


def test_a_refused_prompt_does_not_hurt_the_others(server):
    server.refuse = lambda text: 400 if text == "b" else None
    found = source(server).complete(CHAT, 0)
    assert isinstance(found[1], Refusal)
    assert "HTTP 400: told to refuse" in found[1].detail
    assert [len(found[i]) for i in (0, 2)] == [1, 1]


def test_all_refused_is_an_error_at_first_but_not_later(server):
    asking = source(server)
    server.refuse = lambda text: 400
    with pytest.raises(TeacherAnswerError, match=r"All of the first 3 prompts were refused.*request_options"):
        asking.complete(CHAT, 0)
    server.refuse = lambda text: None
    asking.complete(CHAT, 0)
    server.refuse = lambda text: 422
    assert all(isinstance(answer, Refusal) for answer in asking.complete(CHAT, 0))


def test_what_may_pass_is_tried_again(server):
    left = [503, 429, 500]
    server.refuse = lambda text: left.pop() if left else None
    assert source(server, concurrency=1).complete(CHAT[:1], 0)[0][0].text == "a 0"
    assert len(server.asked) == 4


def test_a_server_that_stays_away(server):
    asking = source(server, retries=1)
    server.stop()
    with pytest.raises(TeacherUnavailable, match=r"tried 2 times.*start the same command again"):
        asking.complete(CHAT, 0)


def test_a_wrong_key_concerns_all(server):
    server.key = "right"
    with pytest.raises(TeacherAnswerError, match=r"401.*`api_key_env`"):
        source(server, api_key="wrong").complete(CHAT, 0)
    assert source(server, api_key="right").complete(CHAT, 0)


def test_urls_keep_their_path():
    assert Endpoint(Address("endpoint", "m", "http://h:1")).url == "http://h:1/v1"
    assert Endpoint(Address("endpoint", "m", "http://h:1/v1beta/openai")).url == "http://h:1/v1beta/openai"


@pytest.mark.parametrize("answer", [{"choices": []}, {"choices": [{"message": None}]}, {}, {"choices": [{"text": 3}]}])
def test_an_answer_without_text_is_an_error(server, monkeypatch, answer):
    asking = source(server)
    monkeypatch.setattr(asking.endpoint, "ask", lambda path, body, halt: answer)
    with pytest.raises(TeacherAnswerError, match="gave an answer with"):
        asking.complete(CHAT, 0)
