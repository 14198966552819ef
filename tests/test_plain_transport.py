"""The transport of one connection for one thread: what servers do to connections, in bytes."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import threading
import time

import httpx2 as httpx
import pytest
from processes import succeeds

from trl_distill import plain_transport
from trl_distill.plain_transport import PlainTransport


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class RawServer:
    """Listens, and lets `serve(connection, number)` deal with each connection in a thread of its own."""

    def __init__(self, serve, family=socket.AF_INET):
        self.serve, self.connections = serve, 0
        self.listening = socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family)
        self.port = self.listening.getsockname()[1]
        self.url = f"http://{'[::1]' if family == socket.AF_INET6 else '127.0.0.1'}:{self.port}/"

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listening.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listening.accept()
                threading.Thread(target=self._one, args=(connection, self.connections), daemon=True).start()
                self.connections += 1

    def _one(self, connection, number):
        with contextlib.suppress(OSError), connection:
            self.serve(connection, number)


def read_request(connection):
    """The bytes of one request with a body; empty where the client has gone."""
    got = b""
    while b"\r\n\r\n" not in got:
        more = connection.recv(65536)
        if not more:
            return b""
        got += more
    head, _, body = got.partition(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
    while len(body) < int(fields.get(b"content-length", 0)):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def answers(*sent):
    """What a connection is sent for one request after the other."""

    def serve(connection, number):
        for one in sent:
            if not read_request(connection):
                return
            connection.sendall(one)
        read_request(connection)

    return serve


def client(timeout=20.0):
    return httpx.Client(transport=PlainTransport(timeout, 5.0, None))


def post(http, url, body=b"{}"):
    return http.post(url, content=body)


def test_a_connection_is_used_again():
    with RawServer(answers(OK, OK, OK)) as server, client() as http:
        assert [post(http, server.url).text for _ in range(3)] == ["ok"] * 3
        assert server.connections == 1


def test_a_connection_that_the_server_closes_without_a_word_is_replaced_at_once(monkeypatch):
    """Also where it is found out only by sending: no attempt is lost, and the server has not failed."""
    monkeypatch.setattr(plain_transport, "IDLE", 1e9)  # no look before a request

    def serve(connection, number):
        read_request(connection)
        connection.sendall(OK)

    with RawServer(serve) as server, client() as http:
        for _ in range(5):
            assert post(http, server.url).text == "ok"
            time.sleep(0.05)  # the server's end arrives
        assert server.connections == 5


def test_a_new_connection_that_ends_without_an_answer_is_an_error():
    with RawServer(lambda connection, number: read_request(connection)) as server, client() as http:
        with pytest.raises(httpx.RemoteProtocolError):
            post(http, server.url)
        assert server.connections == 1


def test_an_answer_that_is_cut_off_is_an_error_and_not_asked_for_again():
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"

    def serve(connection, number):
        read_request(connection)
        connection.sendall(OK)
        read_request(connection)
        connection.sendall(cut)

    with RawServer(serve) as server, client() as http:
        assert post(http, server.url).text == "ok"
        with pytest.raises(httpx.RemoteProtocolError, match="IncompleteRead"):
            post(http, server.url)
        assert server.connections == 1


def test_a_refusal_that_comes_before_all_is_sent_is_read():
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig"

    def serve(connection, number):
        connection.recv(100)
        connection.sendall(refusal)
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.2)  # the refusal arrives before the reset that follows

    with RawServer(serve) as server, client() as http:
        answer = post(http, server.url, b"x" * 30_000_000)
        assert (answer.status_code, answer.text) == (413, "big")


def test_chunked_answers_headers_in_latin_1_and_answers_up_to_the_end_of_the_connection():
    chunked = (
        b"HTTP/1.1 200 OK\r\nServer: caf\xe9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n3;a=b\r\n!!!\r\n0\r\n\r\n"
    )

    def serve(connection, number):
        read_request(connection)
        connection.sendall(chunked)
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nto the end")

    with RawServer(serve) as server, client() as http:
        first = post(http, server.url)
        assert (first.text, first.headers.raw[0]) == ("ok!!!", (b"Server", b"caf\xe9"))
        assert post(http, server.url).text == "to the end"
        assert server.connections == 1


def test_ipv6():
    try:
        server = RawServer(answers(OK), socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server, client() as http:
        assert post(http, server.url).text == "ok"


def test_tls_checks_the_certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    words += ["-keyout", key, "-out", certificate, "-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"]
    succeeds(words)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve(connection, number):
        with context.wrap_socket(connection, server_side=True) as wrapped:
            answers(OK, OK)(wrapped, number)

    known = ssl.create_default_context(cafile=certificate)
    with RawServer(serve) as server:
        url = server.url.replace("http:", "https:")
        with httpx.Client(transport=PlainTransport(20.0, 5.0, known)) as http:
            assert [post(http, url).text for _ in range(2)] == ["ok", "ok"]
        with client() as http, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            post(http, url)


def test_a_server_that_says_nothing_is_given_up_after_the_timeout():
    with RawServer(lambda connection, number: time.sleep(5)) as server, client(timeout=0.2) as http:
        start = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            post(http, server.url)
        assert time.monotonic() - start < 4


def test_many_open_files_are_no_fault(monkeypatch):
    """`select` takes no file descriptor above 1023, and there are as many connections as threads."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("not as many files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    monkeypatch.setattr(plain_transport, "IDLE", -1.0)
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(1050):
                stack.enter_context(open("/dev/null"))
            with RawServer(answers(OK, OK)) as server, client() as http:
                assert [post(http, server.url).text for _ in range(2)] == ["ok", "ok"]
                assert server.connections == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_closing_ends_a_request_that_is_under_way_in_another_thread():
    asked, errors = threading.Event(), []

    def serve(connection, number):
        read_request(connection)
        asked.set()
        connection.recv(1)  # until the client goes

    with RawServer(serve) as server:
        http = client(timeout=600.0)

        def ask():
            try:
                post(http, server.url)
            except httpx.TransportError as error:
                errors.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        assert asked.wait(20)
        http.close()
        thread.join(20)
        assert not thread.is_alive()
        assert len(errors) == 1
