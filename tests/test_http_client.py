"""The HTTP client: secrets that stay hidden, settings by their users' names, an early halt."""

from __future__ import annotations

import email.utils
import json
import logging
import threading
import time
from functools import partial

import pytest
from chat_server import ChatServer, wait_until
from hypothesis import given
from hypothesis import strategies as st

from trl_distill.http_client import (
    HTTPClient,
    NoAnswerError,
    PassingError,
    Settings,
    StatusError,
)
from trl_distill.http_messages import error_inside, retry_after
from trl_distill.server_urls import ServerURL, clean_key, read_url, without_login
from trl_distill.under_way import UnderWay


PATH = "/v1/completions"


def client(*urls, api_key=None, **changes):
    names = {"timeout": "`--patience`", "retries": "`--tries`", "concurrency": "`--at-once`"}
    settings = {"timeout": 20, "retries": 1, "backoff": 0.001, "concurrency": 4, **changes}
    made = Settings(**settings, who="the oracle", names=names, key_advice="Set `secret`.", last_words="Then rest.")
    return HTTPClient(made, [read_url(url, "`url`") for url in urls], api_key)


def asked(http, server, halt=None, text="a"):
    body = {"model": "m", "prompt": text}
    return http.ask([server.url], PATH, body, lambda url, content: json.loads(content)["choices"][0]["text"], halt)


@pytest.fixture
def server():
    with ChatServer(lambda text, seed: text.upper()) as server:
        yield server


def with_login(server):
    return server.url.replace("http://", "http://user:pa%24sword@")


# Secrets


def test_a_login_in_a_url_is_sent_and_never_shown(server, caplog):
    caplog.set_level(logging.DEBUG)
    http = client(with_login(server))
    assert asked(http, server) == "A"
    assert server.headers["Authorization"] == "Basic dXNlcjpwYSRzd29yZA=="
    server.refuse = lambda text: 503
    with pytest.raises(NoAnswerError) as error:
        asked(http, server)
    said = f"{error.value!r} {error.value.__cause__!r} {caplog.text} {read_url(with_login(server), '')!r}"
    assert server.url in said
    assert not [secret for secret in ("pa%24sword", "pa$sword", "dXNlcjpwYSRzd29yZA") if secret in said]


def test_a_key_is_sent_without_white_space_and_never_shown(server, caplog):
    caplog.set_level(logging.DEBUG)
    server.key = "right-key"
    assert asked(client(server.url, api_key=" right-key\r\n"), server) == "A"
    with pytest.raises(StatusError, match=r"HTTP 401: wrong key Bearer \*\*\*\. Set `secret`\.") as error:
        asked(client(server.url, api_key="wrong-key"), server)
    assert error.value.status == 401
    assert "wrong-key" not in f"{error.value!r} {caplog.text}"
    assert "right-key" not in caplog.text


REPEATED = ["pa%24sword", "pa$sword", "dXNlcjpwYSRzd29yZA", 'the"key', 'the\\"key', "the%22key", "a secret of the body"]


@pytest.mark.parametrize("status", [200, 400, 401, 503])
@pytest.mark.parametrize("before", [0, 900, 930, 945, 5000])
def test_secrets_that_a_server_repeats_are_hidden_before_its_message_is_cut(server, caplog, status, before):
    caplog.set_level(logging.DEBUG)
    message = "x" * before + " ".join(REPEATED)
    server.answer = lambda text, seed: message
    server.refuse_with = message
    server.refuse = lambda text: None if status == 200 else status
    http = HTTPClient(
        client().settings, [read_url(with_login(server), "")], 'the"key', secrets=["a secret of the body"]
    )

    def read(url, content):
        raise PassingError(json.loads(content)["choices"][0]["text"])

    with pytest.raises((NoAnswerError, StatusError)) as error:
        http.ask([server.url], PATH, {"model": "m", "prompt": "a"}, read)
    said = f"{error.value!r} {error.value.__cause__!r} {caplog.text}"
    assert "***" in said or before > 900
    assert not [secret for secret in REPEATED if secret[:6] in said]
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"error": {"message": "busy", "code": 503}}, ("busy", 503)),
        ({"error": {"message": "busy", "code": "429"}}, ("busy", 429)),
        ({"error": {"message": "busy", "code": "rate_limit"}, "status": 429}, ("busy", 429)),
        ({"error": "busy"}, ("busy", None)),
        ({"object": "error", "message": "busy", "code": 40303}, ("busy", None)),
        ({"error": {"type": "x"}}, ('{"error": {"type": "x"}}', None)),
        ({"error": {"message": "busy", "code": True}}, ("busy", None)),
        ({"error": None, "choices": []}, None),
        ({"error": {}}, None),
        ({"choices": []}, None),
        ([{"error": "busy"}], None),
        (None, None),
    ],
)
def test_errors_inside_answers(answer, found):
    assert error_inside(answer) == found


@pytest.mark.parametrize("key", ["", "  \n", None])
def test_a_blank_key_is_none(server, key):
    asked(client(server.url, api_key=key), server)
    assert "Authorization" not in server.headers


@given(st.text(min_size=1, max_size=8), st.text(alphabet="\x00\n\r\x7f ü\u200b", min_size=1, max_size=2))
def test_a_key_that_no_header_takes_is_refused_without_being_shown(text, bad):
    key = f"S{text}{bad}S"
    with pytest.raises(ValueError, match=r"holds U\+[0-9A-F]{4,} as character .*Set `secret`") as error:
        clean_key(key, "Set `secret`.")
    assert key not in str(error.value)


@given(st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_a_printable_key_passes(key):
    assert clean_key(f" {key}\n", "") == key


@pytest.mark.parametrize(
    ("url", "base", "login"),
    [
        ("http://h:1/v1/", "http://h:1/v1", None),
        ("https://u:p@h/x", "https://h/x", ("u", "p")),
        ("http://u%40b:p%23@h", "http://h", ("u@b", "p#")),
    ],
)
def test_urls_are_taken_apart(url, base, login):
    assert read_url(url, "`url`") == ServerURL(base, login)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "`url` holds 'localhost:8000'; write it in full"),
        ("http://", "in full"),
        ("http://u:pass#word@h:1", "cannot be read"),
        ("http://u:pass/word@h:1", "cannot be read"),
        ("http://h/v1?key=password", "URL of h with something after"),
        ("http://h/v1#password", "URL of h with something after"),
        ("ftp://u:password@h", "in full"),
        ("http://u:1/password@h", "`@` after the host"),
    ],
)
def test_urls_that_are_refused(url, message):
    with pytest.raises(ValueError, match=message) as error:
        read_url(url, "`url`")
    assert "pass" not in str(error.value).replace("of a password as", "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see http://u:p@h/v1#m and https://h/@x", "see http://***@h/v1#m and https://h/@x"),
        ("HTTP://u:p@h and svn+ssh://u@h", "HTTP://***@h and svn+ssh://***@h"),
        ("http://u:p/a#b?c@h:1/v1", "http://***@h:1/v1"),  # a password with signs that end a URL's host
        ("http://h:80/v1/@x http://h:80#@cf/m http://h:80", "http://h:80/v1/@x http://h:80#@cf/m http://h:80"),
        ("https://h/v4/ai#@cf/m", "https://h/v4/ai#@cf/m"),
        ('"http://h:1/v1", "me@h"', '"http://h:1/v1", "me@h"'),
    ],
)
def test_texts_without_logins(text, shown):
    assert without_login(text) == shown


# What is said and when it ends


def test_no_answer_names_the_address_the_attempts_and_the_settings(server):
    server.refuse = lambda text: 500
    with pytest.raises(NoAnswerError) as error:
        asked(client(server.url), server)
    for part in (
        *(f"from the oracle at {server.url}, tried 2 times", "HTTP 500: told to refuse", "`--patience` (now 20 s)"),
        *("`--at-once` (now 4)", "`--tries` (now 1)", "Then rest."),
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("status", [400, 404, 422, 301])
def test_a_lasting_refusal_is_not_repeated(server, status):
    server.refuse = lambda text: status
    with pytest.raises(StatusError) as error:
        asked(client(server.url), server)
    assert (error.value.status, len(server.asked)) == (status, 1)
    assert ("final URL" in str(error.value)) is (status == 301)


def test_an_answer_may_be_asked_for_again(server):
    def read(url, content):
        if len(server.asked) == 1:
            raise PassingError(f"{url}: broken")
        return url

    assert client(server.url).ask([server.url], PATH, {"model": "m", "prompt": "a"}, read) == server.url + PATH
    assert len(server.asked) == 2


def test_a_date_to_come_back_at_is_waited_for(server):
    times = []

    def refuse(text):
        times.append(time.time())
        server.retry_after = email.utils.formatdate(times[0] + 2, usegmt=True)
        return 503 if len(times) == 1 else None

    server.refuse = refuse
    asked(client(server.url), server)
    date = email.utils.parsedate_to_datetime(server.retry_after).timestamp()
    assert date - 0.05 < times[1] < date + 20


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, 0), ("3", 3), ("0.5", 0.5), ("-3", 0), ("nan", 0), ("inf", 0), ("soon", 0)]
)
def test_retry_after(header, seconds):
    assert retry_after(header) == seconds


def test_results_come_in_order_and_at_most_so_many_at_once():
    together, most, lock, first = [0], [0], threading.Lock(), threading.Barrier(3)

    def call(number, halt):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        if number < 3:
            first.wait(60)
        time.sleep(0.01 * (5 - number % 5))
        with lock:
            together[0] -= 1
        return number

    assert client(concurrency=3).all([partial(call, number) for number in range(10)]) == list(range(10))
    assert most[0] == 3


def test_an_error_does_not_wait_for_requests_under_way_and_lets_none_begin(server):
    begun, end = [], threading.Event()

    def answer(text, seed):
        begun.append(text)
        end.wait(60)
        return text

    server.answer = answer
    http = client(server.url, concurrency=2)

    def fails(halt):
        wait_until(lambda: begun)
        raise RuntimeError("on purpose")

    calls = [fails, *(partial(asked, http, server, text=str(i)) for i in range(5))]
    start = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            http.all([lambda halt, call=call: call(halt=halt) for call in calls])
        assert time.monotonic() - start < 30  # and not until `end`
    finally:
        end.set()
    time.sleep(0.2)
    assert len(begun) == 1


def test_a_place_that_becomes_free_is_taken_by_one_who_waits_for_that_server():
    """Not offered to one who waits for another server, and lost."""
    under_way, got = UnderWay(), []
    a, b = under_way.at_one_of(["a"], 1), under_way.at_one_of(["b"], 1)
    a.__enter__(), b.__enter__()
    leave = threading.Event()

    def take(url):
        with under_way.at_one_of([url], 1):
            got.append(url)
            assert leave.wait(20)

    threads = []
    for url in "ab":  # the one for "a" has waited longer
        threads.append(threading.Thread(target=take, args=[url], daemon=True))
        threads[-1].start()
        wait_until(lambda: len(under_way._waiting) == len(threads))
    b.__exit__(None, None, None)
    wait_until(lambda: got == ["b"])
    leave.set()
    a.__exit__(None, None, None)
    for thread in threads:
        thread.join(20)
    assert got == ["b", "a"]


def test_closing_ends_requests_under_way_so_that_the_process_can_end(server):
    begun, release = threading.Event(), threading.Event()

    def slow(text, seed):
        begun.set()
        release.wait(60)
        return text

    server.answer = slow
    http = client(server.url, timeout=600, retries=9)
    failed = []

    def ask():
        try:
            http.all([partial(asked, http, server)])
        except NoAnswerError as error:
            failed.append(error)

    def asked(http, server, halt):
        return http.ask([server.url], PATH, {"model": "m", "prompt": "a"}, lambda url, content: content, halt)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert begun.wait(20)
    http.close()
    thread.join(20)
    release.set()
    assert not thread.is_alive()
    assert len(failed) == 1
