"""Clients that are slow, greedy, many, unknown or gone, and good ones beside them; and the end of the server."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import openai
import pytest

from modeling_fromage.serving.server import listen, make_server, running
from modeling_fromage.serving.settings import ServerSettings
from tests.helpers.pipelines import picture
from tests.helpers.serving import NAME, as_data_url, ask, connect, head, image_part, read_all, serving
from tests.helpers.talking import NEVER, Pace, make_talker

ASKED = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "ret_bias": NEVER, "max_tokens": 100}
QUICK = {**ASKED, "max_tokens": 2}
CHAT = "/v1/chat/completions"
KEYS = ("first key", "second")
SMALL = {"max_body_bytes": 100_000, "header_timeout": 1.0, "body_timeout": 1.0, "request_timeout": 5.0}


@pytest.fixture(scope="module")
def talker():
    return make_talker()


@pytest.fixture(scope="module")
def small(talker) -> Iterator[str]:
    with serving(talker[0], max_connections=50, **SMALL) as address:
        yield address


@pytest.fixture
def slow(talker) -> Iterator[Pace]:
    """The model takes its time."""
    talker[1].seconds = 0.05
    yield talker[1]
    talker[1].seconds = 0.0


def status_of(answer: bytes) -> int:
    return int(answer.split()[1])


def test_keys(talker, tmp_path):
    with serving(talker[0], KEYS) as address:
        for headers in ({}, {"Authorization": "Bearer first"}, {"Authorization": "Basic second"}):
            for path, body in ((CHAT, QUICK), ("/v1/models", None), ("/metrics", None)):
                status, told, answered = ask(address, path, body, **headers)
                assert status == 401 and told["error"]["code"] == "invalid_api_key"
                assert answered["WWW-Authenticate"] == "Bearer" and "first key" not in str(told)
        for key in KEYS:
            assert ask(address, "/v1/models", Authorization=f"Bearer {key}")[0] == 200
        assert ask(address, "/health")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        # A link in an answer needs no key, but cannot be made without one.
        search = {"query": "red", "top_k": 1}
        found = ask(address, "/v1/images/search", search, Authorization="Bearer second")[1]["data"][0]
        assert ask(found["link"], "")[0] == 200
        assert ask(address, f"/v1/images/{found['id']}")[0] == 403
        assert ask(found["link"].replace(found["id"], "green" if found["id"] != "green" else "red"), "")[0] == 403


def test_keys_are_read_and_never_told(tmp_path):
    file = tmp_path / "keys"
    file.write_text("a\n\n b \n")
    settings = ServerSettings(api_keys_file=str(file))
    assert settings.read_api_keys({"FROMAGE_API_KEYS": "c,d"}) == ["c", "d", "a", "b"]
    assert ServerSettings().read_api_keys({}) == []
    file.write_text("\n")
    for each, environment in ((settings, {}), (ServerSettings(), {"FROMAGE_API_KEYS": ""})):
        with pytest.raises(ValueError, match="There are no API keys"):
            each.read_api_keys(environment)
    with pytest.raises(ValueError, match="cannot be read"):
        ServerSettings(api_keys_file=str(tmp_path)).read_api_keys({})


def test_other_origins_are_let_in_by_name_alone(talker):
    preflight = {"Origin": "https://chat.example.org", "Access-Control-Request-Method": "POST"}
    with serving(talker[0], KEYS, cors_origins=["https://chat.example.org"]) as address:
        for origin, allowed in (("https://chat.example.org", True), ("https://evil.example.org", False)):
            _, _, headers = ask(address, "/health", Origin=origin)
            assert (headers["Access-Control-Allow-Origin"] == origin) == allowed
            with connect(address) as connection:
                lines = "".join(f"{name}: {value}\r\n" for name, value in {**preflight, "Origin": origin}.items())
                connection.sendall(f"OPTIONS {CHAT} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{lines}\r\n".encode())
                assert status_of(read_all(connection)) == (200 if allowed else 400)
    with serving(talker[0]) as address:
        assert "Access-Control-Allow-Origin" not in ask(address, "/health", **preflight)[2]


def test_large_bodies(small):
    """By their length, and as they come; many clients read nothing before they have sent it all."""
    body = b" " * 5_000_000
    assert ask(small, CHAT, body)[0] == 413
    for headers, pieces in (
        ({"Content_Length": len(body)}, [body]),
        ({"Transfer_Encoding": "chunked"}, [b"%x\r\n%b\r\n" % (len(body), body), b"0\r\n\r\n"]),
    ):
        with connect(small) as connection:
            connection.sendall(head(CHAT, **headers) + b"".join(pieces))
            answer = read_all(connection)
        assert status_of(answer) == 413 and b"larger than 100,000 bytes" in answer
    with connect(small) as connection:
        connection.sendall(head(CHAT, Content_Length=len(body), Expect="100-continue"))
        assert status_of(read_all(connection)) == 413
    assert ask(small, CHAT, QUICK)[0] == 200


def test_slow_clients(small):
    """Those whose headers or body never end, and one that sends a byte at a time."""
    for sent, told in (
        (b"", b"No whole request"),
        (head(CHAT)[:-2], b"No whole request"),
        (head(CHAT, Content_Length=10) + b"{", b"did not arrive"),
    ):
        with connect(small) as connection:
            connection.sendall(sent)
            began = time.monotonic()
            answer = read_all(connection)
            assert status_of(answer) == 408 and told in answer and 0.5 < time.monotonic() - began < 4
    with connect(small) as connection:
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 10:
                connection.sendall(b"P")
                time.sleep(0.1)
        assert time.monotonic() - began < 5


def test_a_kept_connection_that_stops_within_its_second_request(small):
    with connect(small) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(0.3)
        connection.sendall(b"GET /hea")
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200") == 1 and b"HTTP/1.1 408" in answer


def test_many_open_connections(small):
    """Far more than are allowed: those that ask are served, those that do not make room."""
    idle = [connect(small) for _ in range(300)]
    try:
        assert all(ask(small, CHAT, QUICK)[0] == 200 for _ in range(3))
        answers = [connection.recv(1000) for connection in idle[:200]]
        assert all(status_of(answer) == 503 and b"Retry-After" in answer.title() for answer in answers)
    finally:
        for connection in idle:
            connection.close()
    assert ask(small, "/health")[0] == 200


def test_a_client_that_reads_nothing_is_cut_off(talker):
    """An answer larger than every buffer on the way."""
    with running(server := make_server(talker[0], ServerSettings(port=0, **SMALL), NAME)) as address:
        body = json.dumps({**ASKED, "max_tokens": 1, "ret_bias": 20, "inline_images": True}).encode()
        with connect(address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for _ in range(300):
                connection.sendall(head(CHAT, Content_Length=len(body)) + body)
                if not server.server_state.connections:
                    break
            deadline = time.monotonic() + 20
            while server.server_state.connections and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not server.server_state.connections
        assert ask(address, "/health")[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_answer(small, talker, slow, stream):
    body = json.dumps({**ASKED, "stream": stream}).encode()
    with connect(small) as connection:
        connection.sendall(head(CHAT, Content_Length=len(body)) + body)
        deadline = time.monotonic() + 5
        before = slow.steps
        while slow.steps < before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    time.sleep(1.5)
    steps = slow.steps
    time.sleep(0.5)
    assert before + 2 <= slow.steps == steps < before + 60
    _, text, _ = ask(small, "/metrics")
    assert b'fromage_requests_total{route="/v1/chat/completions",status="499"}' in text or stream


def test_a_request_that_takes_too_long(talker, slow):
    with serving(talker[0], request_timeout=1.0) as address:
        status, told, _ = ask(address, CHAT, ASKED)
        assert status == 504 and told["error"]["code"] == "timeout"
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="longer than 1 seconds"):
            list(client.chat.completions.create(model=NAME, messages=ASKED["messages"], stream=True,
                                                max_tokens=100, extra_body={"ret_bias": NEVER}))  # fmt: skip
        slow.seconds = 0.0
        assert ask(address, CHAT, QUICK)[0] == 200


def test_a_full_queue(talker, slow):
    answers = []
    with serving(talker[0], max_queue=1, max_batch_size=1) as address:
        threads = [threading.Thread(target=lambda: answers.append(ask(address, CHAT, {**ASKED, "max_tokens": 20})))
                   for _ in range(8)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429} and 1 <= statuses.count(200) < 8
    refused = next((told, headers) for status, told, headers in answers if status == 429)
    assert refused[0]["error"]["code"] == "queue_full" and int(refused[1]["Retry-After"]) >= 1


def test_images_of_private_addresses_where_they_are_allowed(talker):
    with serving(talker[0], allow_private_addresses=True, image_timeout=1.0) as address:

        def ask_about(url):
            part = {"type": "image_url", "image_url": {"url": url}}
            return ask(address, CHAT, {**QUICK, "messages": [{"role": "user", "content": [part]}]})

        status, told, _ = ask_about("http://127.0.0.1:1/a.png")
        assert status == 400 and "connection failed" in told["error"]["message"]
        with socket.create_server(("127.0.0.1", 0)) as silent:
            status, told, _ = ask_about(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")
            assert status == 400 and "timed out" in told["error"]["message"]
        assert ask_about(as_data_url(picture("red")))[0] == 200
    with serving(talker[0], max_image_pixels=1000) as address:
        messages = [{"role": "user", "content": [image_part(picture("red"))]}]
        status, told, _ = ask(address, CHAT, {**QUICK, "messages": messages})
        assert status == 400 and "too many pixels" in told["error"]["message"]


def test_an_answer_of_nothing_has_no_first_part(talker):
    with serving(talker[0]) as address:
        text = ask(address, CHAT, QUICK)[1]["choices"][0]["message"]["content"]
        assert not ask(address, CHAT, {**QUICK, "stop": text[0]})[1]["choices"][0]["message"]["content"]
        lines = ask(address, "/metrics")[1].decode().splitlines()
    assert "fromage_first_token_seconds_count 1.0" in lines


def test_metrics(talker):
    with serving(talker[0]) as address:
        ask(address, CHAT, {**QUICK, "ret_bias": 20})
        ask(address, CHAT, {})
        status, text, headers = ask(address, "/metrics")
    text = text.decode()
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'fromage_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'fromage_requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
    tokens = dict(line.split() for line in text.splitlines() if line.startswith("fromage_tokens_total{"))
    assert float(tokens['fromage_tokens_total{kind="read"}']) > 1
    assert float(tokens['fromage_tokens_total{kind="written"}']) >= 1
    assert "fromage_images_shown_total" in text and "process_resident_memory_bytes" in text


def begin(request, slow) -> threading.Thread:
    """Make a request in a thread; the model is at it."""
    thread, before = threading.Thread(target=request), slow.steps
    thread.start()
    while slow.steps < before + 2:
        time.sleep(0.01)
    return thread


def test_the_end_of_the_server(talker, slow):
    """What runs is finished; what comes meanwhile is told to come again."""
    answers = []
    with running(server := make_server(talker[0], ServerSettings(port=0), NAME)) as address:
        runs = begin(lambda: answers.append(ask(address, CHAT, {**ASKED, "max_tokens": 30})), slow)
        server.end()
        time.sleep(0.3)
        status, told, headers = ask(address, CHAT, QUICK)
        assert status == 503 and told["error"]["code"] == "shutting_down" and headers["Retry-After"]
        assert ask(address, "/health")[0] == 503
        runs.join()
    assert answers[0][0] == 200 and answers[0][1]["choices"][0]["message"]["content"]


def test_the_end_of_the_server_waits_so_long_and_no_longer(talker, slow):
    answers = []
    with running(server := make_server(talker[0], ServerSettings(port=0, shutdown_timeout=0.5), NAME)) as address:
        runs = begin(lambda: answers.append(ask(address, CHAT, ASKED)), slow)
        server.end()
        runs.join(5)
    assert answers[0][0] == 503 and answers[0][1]["error"]["code"] == "shutting_down"


def test_a_port_that_is_taken():
    with listen("127.0.0.1", [0]) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127.0.0.1:{port} cannot be served \(Address already in use\)"):
            listen("127.0.0.1", [port])
        with listen("127.0.0.1", [port, 0]) as other:
            assert other.getsockname()[1] != port
