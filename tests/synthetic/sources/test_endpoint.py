"""Endpoints: what is asked, what is tried again, what concerns one prompt and what concerns all."""

from __future__ import annotations

import pytest
from chat_server import ChatServer

from trl_distill import TeacherAnswerError, TeacherUnavailable
from trl_distill.synthetic.address import Address
from trl_distill.synthetic.config import GenerateConfig
from trl_distill.synthetic.records import Completion, Refusal
from trl_distill.synthetic.sources.answers import end_of
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


# Status 200, and no completion in it


def said(**choice):
    return {"choices": [{"index": 0, **choice}]}


MESSAGE = {"role": "assistant", "content": "x"}


ODD = {
    "error with a message": {"error": {"message": "provider failed", "code": 502}},
    "error as text": {"error": "provider failed"},
    "error as an object": {"object": "error", "message": "provider failed", "code": 40303},
    "error that lasts": {"error": {"message": "moderation", "code": 403}, "choices": None},
    "error of the prompt": {"error": {"message": "too long", "code": "400"}},
    "error in a choice": said(message=MESSAGE, finish_reason="error", error={"code": 502}),
    "no choices": {"object": "completion"},
    "choices are null": {"choices": None},
    "choices are empty": {"choices": []},
    "a choice is null": {"choices": [None]},
    "null message": said(message=None, finish_reason="stop"),
    "empty message": said(message={}, finish_reason="stop"),
    "null content": said(message={"role": "assistant", "content": None}, finish_reason="stop"),
    "content is a number": said(message={"content": 3}, finish_reason="stop"),
    "a part is an image": said(message={"content": [{"type": "image_url", "image_url": {}}]}, finish_reason="stop"),
    "text is a number": said(text=3, finish_reason="stop"),
    "null reason to finish": said(message=MESSAGE, finish_reason=None),
    "no reason to finish": said(message=MESSAGE),
    "aborted": said(message=MESSAGE, finish_reason="abort"),
    "null": None,
    "a list": [],
    "HTML": "<html>Bad gateway</html>",
    "cut": '{"choices": [{"mess',
    "stream": 'data: {"choices": []}\n\ndata: [DONE]\n',
    "nothing": "",
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_is_asked_for_again(server, name):
    left = [ODD[name]]
    server.alter = lambda text, answer: left.pop() if left and text == "b" else answer
    found = source(server).complete(CHAT, 0)
    lasting = name in ("error that lasts", "error of the prompt")
    assert isinstance(found[1], Refusal) is lasting
    assert len(server.asked) == (3 if lasting else 4)
    assert [found[i][0].text for i in (0, 2)] == ["a 0", "c 2"]


@pytest.mark.parametrize("name", ODD)
def test_an_answer_that_stays_odd_costs_one_prompt(server, name):
    server.alter = lambda text, answer: ODD[name] if text == "b" else answer
    found = source(server, retries=2).complete(CHAT, 0)
    assert [found[i][0].text for i in (0, 2)] == ["a 0", "c 2"]
    assert found[1].kind == ("refused by" if "prompt" in name else "unusable answer of") + " the endpoint"
    assert server.url in found[1].detail


def test_a_good_choice_beside_odd_ones_is_kept_and_the_others_are_asked_for_again(server):
    left = [1]

    def alter(text, answer):
        if left:
            answer["choices"][left.pop()]["message"] = None
        return answer

    server.alter = alter
    found = source(server, n=3).complete(CHAT[:1], 0)[0]
    assert [body["n"] for body in server.asked] == [3, 1]
    assert len({completion.text for completion in found}) == 3


def test_only_odd_answers_are_the_servers_fault(server):
    asking, chats = source(server, retries=0), [[{"role": "user", "content": str(i)}] for i in range(9)]
    asking.complete(CHAT, 0)
    server.alter = lambda text, answer: {"error": {"message": "credits used up", "code": 402}}
    with pytest.raises(TeacherUnavailable, match=r"None of 9 answers.*402|None of 9 answers.*credits used up"):
        asking.complete(chats, 0)
    assert all(isinstance(answer, Refusal) for answer in asking.complete(CHAT, 0))  # three may be chance
    with pytest.raises(TeacherAnswerError, match=r"All of the first 3 prompts were refused.*credits used up"):
        source(server).complete(CHAT, 0)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        (["one ", {"type": "output_text", "text": "two"}], "one two"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "two"}], "two"),
        ({"type": "text", "text": "one"}, "one"),
        ("", ""),
    ],
)
def test_content_as_parts_is_joined(server, content, text):
    server.alter = lambda _, answer: said(message={"content": content}, finish_reason="stop")
    assert source(server).complete(CHAT[:1], 0) == [[Completion(text, "stop")]]


@pytest.mark.parametrize(
    ("extra", "reason", "ended"),
    [
        ({"tool_calls": [{"id": "1"}]}, "tool_calls", "tool_calls"),
        ({"reasoning_content": "hm"}, "length", "length"),
        ({"refusal": "I cannot"}, "stop", "refusal"),
        ({}, "content_filter", "content_filter"),
    ],
)
def test_a_reason_for_no_text_is_not_odd(server, extra, reason, ended):
    server.alter = lambda _, answer: said(message={"content": None, **extra}, finish_reason=reason)
    assert source(server).complete(CHAT[:1], 0) == [[Completion("", ended)]]
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("reasons", "ended"),
    [
        (["stop", "STOP", "eos_token", "eos", "EOS", "stop_sequence", "end_turn", "END_TURN", "endTurn"], "stop"),
        (["COMPLETE", "FinishReason.STOP", "FINISH_REASON_STOP", {"type": "eos_token"}, "end-of-turn"], "stop"),
        (["length", "max_tokens", "MAX_TOKENS", "maxTokens", "model_length", "FinishReason.MAX_TOKENS"], "length"),
        (["max_new_tokens", "max_output_tokens", {"type": "length", "length": 3}], "length"),
        (["abort", "ERROR", "cancelled"], "error"),
        ([None, "", "null", "FINISH_REASON_UNSPECIFIED", {}, []], None),
        (["content_filter"], "content_filter"),
        (["SAFETY"], "SAFETY"),
        ([7], "7"),
    ],
)
def test_reasons_to_finish_in_our_words(reasons, ended):
    assert [end_of(reason) for reason in reasons] == [ended] * len(reasons)


# Keys in the options


OPTIONS = {
    "max_tokens": None,
    "stop": ["$END"],
    "extra_headers": {"Authorization": "Bearer ${ONE_KEY}", "X": "${KEPT}"},
    "api_key": "$OTHER_KEY",
}


def with_options(server, monkeypatch):
    monkeypatch.setenv("ONE_KEY", "top-secret-1")
    monkeypatch.setenv("OTHER_KEY", "top-secret-2\n")
    config = GenerateConfig(
        dataset_name="p",
        output_dir="o",
        teacher_model_name_or_path=f"{server.url}#m",
        request_options=OPTIONS,
        retries=0,
    )
    return EndpointSource.from_config(next(iter(config.teachers.values())), Sampling(1), config)


def test_keys_in_options_come_from_the_environment(server, monkeypatch):
    with_options(server, monkeypatch).complete(CHAT[:1], 0)
    body = server.asked[-1]
    assert (body["api_key"], body["extra_headers"]["Authorization"]) == ("top-secret-2", "Bearer top-secret-1")
    assert (body["stop"], body["extra_headers"]["X"]) == (["$END"], "${KEPT}")  # settings that are not keys
    monkeypatch.delenv("OTHER_KEY")
    with pytest.raises(ValueError, match="`request_options` reads the environment variable OTHER_KEY"):
        EndpointSource.from_config(
            Address("endpoint", "m", server.url),
            Sampling(1),
            GenerateConfig(
                dataset_name="p",
                output_dir="o",
                teacher_model_name_or_path="x",
                request_options={"token": "$OTHER_KEY"},
            ),
        )


@pytest.mark.parametrize("inside", [False, True])
def test_keys_that_a_server_repeats_are_hidden(server, monkeypatch, caplog, inside):
    def alter(text, answer):
        return (
            {"error": {"message": f"{'x' * 990} {server.asked[-1]}", "code": 400}} if inside else f"{server.asked[-1]}"
        )

    server.alter = alter
    answer = with_options(server, monkeypatch).complete(CHAT[:1], 0)[0]
    assert isinstance(answer, Refusal)
    assert "top-secret" not in f"{answer} {caplog.text}"
    assert "top-sec" not in f"{answer} {caplog.text}"  # nor a part, where a message is cut


def test_a_variable_for_the_key_that_is_not_set(server, monkeypatch):
    config = GenerateConfig(
        dataset_name="p", output_dir="o", teacher_model_name_or_path=f"{server.url}#m", api_key_env="sesame_key"
    )
    address = config.teachers["m"]
    with pytest.raises(ValueError, match="is not set") as error:
        EndpointSource.from_config(address, Sampling(1), config)
    assert "sesame" not in str(error.value)
    monkeypatch.setenv("sesame_key", "right\n")
    server.key = "right"
    assert EndpointSource.from_config(address, Sampling(1), config).complete(CHAT, 0)
