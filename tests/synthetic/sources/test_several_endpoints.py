"""One teacher at several endpoints: balance, limits, failures; and reasoning beside the answer."""

from __future__ import annotations

import threading

import pytest
from chat_server import ChatServer, wait_until

from trl_distill.synthetic import Completion
from trl_distill.synthetic.address import Address, parse_address
from trl_distill.synthetic.sources.base import Sampling
from trl_distill.synthetic.sources.endpoint import Endpoint, EndpointSource


CHATS = [[{"role": "user", "content": f"word {i}"}] for i in range(24)]


def source(*servers, **options):
    address = Address("endpoint", "m", servers[0].url, tuple(server.url for server in servers[1:]))
    keep = options.pop("keep_reasoning", "no")
    return EndpointSource(Endpoint(address, backoff=0.001, **options), Sampling(1), keep_reasoning=keep)


@pytest.fixture
def servers():
    with ChatServer(lambda text, seed: f"{text} {seed}") as one, ChatServer(lambda text, seed: f"{text} {seed}") as two:
        yield one, two


@pytest.mark.parametrize("several", ["http://a:1/v1#m, http://b:2/v1#m", ["http://a:1/v1#m", "http://b:2/v1#m"]])
def test_several_addresses_of_one_model(several):
    assert parse_address(several) == Address("endpoint", "m", "http://a:1/v1", ("http://b:2/v1",))


@pytest.mark.parametrize(
    ("several", "message"),
    [
        ("http://a:1/v1#m,http://b:2/v1#n", "serve different models: 'm', 'n'"),
        (["http://a:1/v1#m", "folder"], "one of them is no endpoint"),
        ([], "the list is empty"),
    ],
)
def test_several_addresses_that_are_no_single_teacher(several, message):
    with pytest.raises(ValueError, match=message):
        parse_address(several)


def test_answers_do_not_depend_on_which_endpoint_is_asked(servers):
    expected = [[Completion(f"word {i} {7 + i}", "stop")] for i in range(24)]

    def both_are_asked(text):
        wait_until(lambda: all(server.asked for server in servers))

    servers[0].refuse = servers[1].refuse = both_are_asked
    assert source(*servers).complete(CHATS, 7) == expected == source(servers[0]).complete(CHATS, 7)
    assert {len(server.asked) > 0 for server in servers} == {True}


def test_the_limit_holds_at_each_endpoint_and_a_slow_one_gets_less():
    """The slow one waits until the fast one has answered all but four; the fast one waits for company once."""
    now, most, lock, company = [0, 0], [0, 0], threading.Lock(), threading.Barrier(2)

    def answers(which, wait):
        def answer(text, seed):
            with lock:
                now[which] += 1
                most[which] = max(most[which], now[which])
            wait(text)
            with lock:
                now[which] -= 1
                answered[which] += 1
            return text

        return answer

    def meet(text):
        if answered[1] == 0:
            company.wait(60)

    answered = [0, 0]
    slowly = lambda text: wait_until(lambda: answered[1] >= len(CHATS) - 4)  # noqa: E731
    with ChatServer(answers(0, slowly)) as slow, ChatServer(answers(1, meet)) as fast:
        source(slow, fast, concurrency=2).complete(CHATS, 0)
        assert most == [2, 2]
        assert len(slow.asked) <= 4 < len(fast.asked)


def test_an_endpoint_that_fails_is_left_out_and_no_prompt_is_lost(servers):
    servers[0].refuse = lambda text: 503
    asking = source(*servers, concurrency=2, retries=1)
    assert all(isinstance(answer, list) for answer in asking.complete(CHATS, 0))
    failed = len(servers[0].asked)
    assert failed <= 4  # those that were on the way when it failed first
    asking.complete(CHATS, 0)
    assert len(servers[0].asked) == failed


REASONED = {"role": "assistant", "content": "four", "reasoning_content": " two and two "}


@pytest.mark.parametrize(
    ("message", "kept", "expected"),
    [
        (REASONED, "no", Completion("four", "stop")),
        (REASONED, "think", Completion("<think>\ntwo and two\n</think>\n\nfour", "stop")),
        (REASONED, "column", Completion("four", "stop", " two and two ")),
        ({"content": "four", "reasoning": "r"}, "column", Completion("four", "stop", "r")),
        ({"content": "four"}, "think", Completion("four", "stop")),
        ({"content": "", "reasoning": "r"}, "think", Completion("", "stop")),
        (
            {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "four"}]},
            "think",
            Completion("<think>\nhm\n</think>\n\nfour", "stop"),
        ),
    ],
)
def test_reasoning_beside_the_answer(servers, message, kept, expected):
    servers[0].alter = lambda text, answer: {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert source(servers[0], keep_reasoning=kept).complete(CHATS[:1], 0) == [[expected]]


def test_reasoning_as_a_column_of_the_dataset(bench):
    bench.prompts([{"prompt": chat} for chat in CHATS[:6]])
    with ChatServer(lambda text, seed: f"all about {text}") as server:

        def alter(text, answer):
            if text != "word 3":
                answer["choices"][0]["message"]["reasoning_content"] = f"thoughts on {text}"
            return answer

        server.alter = alter
        settings = {"teacher_model_name_or_path": f"{server.url}#m"}
        bench.run(**settings, keep_reasoning="column")
        expected = [f"thoughts on word {i}" if i != 3 else None for i in range(6)]
        assert [row["reasoning"] for row in bench.rows()] == expected
        with pytest.raises(ValueError, match="`keep_reasoning` was 'column', now 'think'"):
            bench.run(**settings, keep_reasoning="think", overwrite=True)
