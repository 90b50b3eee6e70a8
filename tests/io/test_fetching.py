import base64
import io
import ipaddress
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modeling_fromage.images_fromage import ImageLimits, UnreadableImageError, is_url, load_rgb_image
from modeling_fromage.io.fetching import fetch

NAME = "images.example"
PUBLIC, ALSO_PUBLIC = "93.184.216.34", "93.184.215.14"
TIMEOUT = 0.3
SLACK = 1.0  # a busy machine's
FOR_EVER = 3.0  # or longer than any test waits
LOCAL = ImageLimits(timeout=5, allow_private_addresses=True)
HASTY = ImageLimits(timeout=TIMEOUT, allow_private_addresses=True)
SMALL = ImageLimits(timeout=5, max_bytes=1000, allow_private_addresses=True)


def png(width: int = 12, height: int = 10) -> bytes:
    """Noise, which does not compress: half of the file is half of the image."""
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PNG = png()


# ---- a server that answers as badly as it is told to ----


class ImageServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls:  # the handshake is left to the handler's thread
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.connections = 0
        self.requests: list[str] = []
        self.hosts: list[str] = []
        self.hung_up, self.closing = threading.Event(), threading.Event()

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client that hangs up is what is tested
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ImageServer

    def log_message(self, *args: Any):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        self.server.hosts.append(self.headers["Host"])
        try:
            self.server.answers[self.path](self)
        except OSError:
            self.server.hung_up.set()


@contextmanager
def image_server(tls: ssl.SSLContext | None = None) -> Iterator[ImageServer]:
    server = ImageServer(tls)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server():
    with image_server() as server:
        yield server


def head(status: str = "200 OK", **headers: Any) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{key.replace('_', '-')}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def sends(data: bytes, then: bytes | None = None, every: float = 0.0) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answers with `data` and, if there is a `then`, with that again and again till the client hangs up.

    Or for `FOR_EVER`, so that a client without a limit fails its test and does not hang it.
    """

    def answer(handler):
        end = time.monotonic() + FOR_EVER
        handler.wfile.write(data)
        while then is not None and time.monotonic() < end and not handler.server.closing.wait(every):
            handler.wfile.write(then)

    return answer


def waits(data: bytes = b"") -> Callable[[BaseHTTPRequestHandler], None]:
    return sends(data, b"", every=0.05)


def serves(body: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    return sends(head(Content_Length=len(body)) + body)


def redirects(to: str, status: str = "302 Found") -> Callable[[BaseHTTPRequestHandler], None]:
    return sends(head(status, Location=to, Content_Length=0))


def failure(read: Callable, source: Any, limits: ImageLimits | None = None) -> tuple[UnreadableImageError, float]:
    """What reading fails with, and after how many seconds."""
    started = time.monotonic()
    with pytest.raises(UnreadableImageError) as caught:
        read(source, limits) if limits else read(source)
    return caught.value, time.monotonic() - started


# ---- a network where names resolve as told, and public addresses lead to this machine ----


class Network:
    def __init__(self):
        self.names: dict[str, list[list[str]]] = {}  # what a name resolves to, time after time
        self.delay = 0.0
        self.dead: set[str] = set()
        self.connected: list[str] = []
        self._getaddrinfo, self._connect = socket.getaddrinfo, socket.socket.connect

    def resolves(self, name: str, *answers: list[str]):
        self.names[name] = list(answers)

    def getaddrinfo(self, host, *args, **kwargs):
        if host not in self.names:
            return self._getaddrinfo(host, *args, **kwargs)
        time.sleep(self.delay)
        answers = self.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [info for address in addresses for info in self._getaddrinfo(address, *args, **kwargs)]

    def connect(self, opened: socket.socket, address: tuple):
        self.connected.append(address[0])
        if address[0] in self.dead:
            time.sleep(opened.gettimeout())
            raise TimeoutError
        if address[0] not in (PUBLIC, "127.0.0.1"):
            raise ConnectionRefusedError
        return self._connect(opened, ("127.0.0.1", address[1]))


@pytest.fixture
def network(monkeypatch):
    network = Network()
    monkeypatch.setattr(socket, "getaddrinfo", network.getaddrinfo)
    # One level below socket.create_connection, so that no way to connect goes unseen.
    monkeypatch.setattr(socket.socket, "connect", lambda opened, address: network.connect(opened, address))
    return network


# ---- answers ----


def test_an_image_is_fetched(server):
    server.answers["/a.png?size=2"] = serves(PNG)
    url = f"{server.url}/a.png?size=2"
    assert fetch(url, LOCAL) == PNG
    image = load_rgb_image(url, LOCAL)
    assert (image.mode, image.size) == ("RGB", (12, 10))
    assert (np.asarray(image) == np.asarray(Image.open(io.BytesIO(PNG)))).all()


@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden", "500 Oops", "204 No Content", "302 Found"])
def test_a_status_is_the_reason(server, status):
    server.answers["/a.png"] = sends(head(status, Content_Length=0))  # a 302 without a Location leads nowhere
    error, _ = failure(fetch, f"{server.url}/a.png", LOCAL)
    assert error.reason == f"HTTP {status[:3]}"
    assert isinstance(error, ValueError) and error.name == f"{server.url}/a.png"
    assert error.name in str(error) and error.reason in str(error)


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error, _ = failure(fetch, f"http://127.0.0.1:{port}/a.png", LOCAL)
    assert error.reason == "connection failed" and "ConnectionRefusedError" in str(error)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n", head(Content_Length="many")])
def test_no_http_is_a_failed_connection(server, answer):
    server.answers["/a.png"] = sends(answer)
    assert failure(fetch, f"{server.url}/a.png", LOCAL)[0].reason == "connection failed"


def test_a_body_that_breaks_off_is_a_failed_connection(server):
    server.answers["/chunked.png"] = sends(head(Transfer_Encoding="chunked") + b"fff\r\n" + PNG)
    assert failure(fetch, f"{server.url}/chunked.png", LOCAL)[0].reason == "connection failed"


def test_a_body_shorter_than_its_length_is_a_failed_connection(server):
    server.answers["/a.png"] = sends(head(Content_Length=len(PNG) + 1) + PNG)
    assert failure(fetch, f"{server.url}/a.png", LOCAL)[0].reason == "connection failed"


def test_a_connection_that_stays_open_does_not_hold_up(server):
    server.answers["/a.png"] = waits(head(Content_Length=len(PNG)) + PNG)
    server.answers["/chunked.png"] = waits(
        head(Transfer_Encoding="chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(PNG), PNG)
    )
    assert fetch(f"{server.url}/chunked.png", HASTY) == PNG
    assert fetch(f"{server.url}/a.png", HASTY) == PNG


def test_an_address_may_have_spaces_and_umlauts(server):
    server.answers["/%C3%A4%20b%20c.png?q=%C3%B6"] = serves(PNG)
    server.answers["/a.png"] = redirects("/ä b%20c.png?q=ö")
    assert fetch(f"{server.url}/ä b%20c.png?q=ö", LOCAL) == PNG
    assert fetch(f"{server.url}/a.png", LOCAL) == PNG


# ---- time ----


def assert_timed_out(url: str, limits: ImageLimits = HASTY, slack: float = SLACK):
    error, seconds = failure(fetch, url, limits)
    assert error.reason == "timed out"
    assert limits.timeout * 0.9 < seconds < limits.timeout + slack


def test_a_silent_server_times_out(server):
    server.answers["/a.png"] = waits()
    assert_timed_out(f"{server.url}/a.png")
    assert server.requests == ["/a.png"]


def test_a_server_silent_after_its_headers_times_out(server):
    server.answers["/a.png"] = waits(head(Content_Length=len(PNG)) + PNG[:-1])
    assert_timed_out(f"{server.url}/a.png")


def test_a_handshake_without_an_answer_times_out():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert_timed_out(f"https://127.0.0.1:{listener.getsockname()[1]}/a.png")


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"HTTP/1.1 200 ", b"x"),
        (head()[:-2] + b"X-Slow: ", b"x"),
        (head()[:-2], b"X-Slow: x\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (head(Content_Length=1000), b"x"),
        (head(), b"x"),
        (head(Transfer_Encoding="chunked"), b"1\r\nx\r\n"),
        (head(Transfer_Encoding="chunked") + b"0\r\n", b"X-Slow: x\r\n"),
    ],
    ids=["status", "header", "headers", "continue", "body", "endless body", "chunks", "trailers"],
)
def test_dripping_does_not_stretch_the_time(server, start, drop):
    server.answers["/a.png"] = sends(start, drop, every=0.02)
    assert_timed_out(f"{server.url}/a.png")
    assert server.hung_up.wait(SLACK)


def test_redirects_share_the_time(server):
    def slowly(handler):
        handler.server.closing.wait(TIMEOUT / 3)
        redirects("/a.png")(handler)

    server.answers["/a.png"] = slowly
    assert_timed_out(f"{server.url}/a.png")
    assert 2 <= len(server.requests) <= 4


def test_a_hosts_addresses_share_the_time(network):
    limits = ImageLimits(timeout=0.2)
    addresses = [f"93.184.216.{last}" for last in range(1, 9)]
    network.dead.update(addresses)
    network.resolves(NAME, addresses)
    assert_timed_out(f"http://{NAME}/a.png", limits)
    assert network.connected


def test_resolving_counts_against_the_time(network, server):
    server.answers["/a.png"] = waits()
    network.resolves(NAME, [PUBLIC])
    network.delay = 0.5
    assert_timed_out(f"http://{NAME}:{server.server_port}/a.png", ImageLimits(timeout=0.6), slack=0.35)


def test_a_name_that_does_not_resolve_in_time(network):
    network.resolves(NAME, [PUBLIC])
    network.delay = 1.0
    assert_timed_out(f"http://{NAME}/a.png", ImageLimits(timeout=0.1), slack=0.6)


# ---- bytes ----


def test_a_long_length_is_refused_unread(server):
    server.answers["/a.png"] = waits(head(Content_Length=2_000_000_000))
    error, seconds = failure(fetch, f"{server.url}/a.png", ImageLimits(timeout=5, allow_private_addresses=True))
    assert error.reason == "too large" and "20,000,000" in str(error)
    assert seconds < 2  # a byte of the body never comes


def framed(kind: str, body: bytes) -> bytes:
    if kind == "chunked":
        return head(Transfer_Encoding="chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return (head(Content_Length=len(body)) if kind == "length" else head()) + body


@pytest.mark.parametrize("kind", ["length", "chunked", "till the end"])
def test_max_bytes_is_the_last_size_that_passes(server, kind):
    server.answers["/most"] = sends(framed(kind, b"x" * SMALL.max_bytes))
    server.answers["/more"] = sends(framed(kind, b"x" * (SMALL.max_bytes + 1)))
    assert fetch(f"{server.url}/most", SMALL) == b"x" * SMALL.max_bytes
    assert failure(fetch, f"{server.url}/more", SMALL)[0].reason == "too large"


@pytest.mark.parametrize("kind", ["chunked", "one chunk", "till the end"])
def test_an_endless_body_stops_at_max_bytes(server, kind):
    block = b"x" * 0x8000
    start, then = {
        "chunked": (head(Transfer_Encoding="chunked"), b"8000\r\n%s\r\n" % block),
        "one chunk": (head(Transfer_Encoding="chunked") + b"fffffffffff\r\n", block),
        "till the end": (head(), block),
    }[kind]
    sent = []

    def floods(handler):
        handler.wfile.write(start)
        while not handler.server.closing.is_set():
            handler.wfile.write(then)
            sent.append(len(then))

    server.answers["/a.png"] = floods
    limits = ImageLimits(timeout=5, max_bytes=100_000, allow_private_addresses=True)
    error, seconds = failure(fetch, f"{server.url}/a.png", limits)
    assert error.reason == "too large" and seconds < 2
    assert sum(sent) < 50_000_000  # sent, not read: the sockets' buffers hold some megabytes


@pytest.mark.parametrize("start", [head("404 Not Found"), head() + b"x" * 2000], ids=["status", "size"])
def test_a_refused_answer_is_hung_up_on_while_its_error_is_kept(server, start):
    server.answers["/a.png"] = sends(start, b"x", every=0.01)
    kept = failure(fetch, f"{server.url}/a.png", SMALL)
    assert server.hung_up.wait(0.5), kept


# ---- redirects ----


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_followed(server, status):
    server.answers["/old/a.png"] = redirects("../new/b.png?x=1", status)
    server.answers["/new/b.png?x=1"] = redirects(f"{server.url}/c.png", status)
    server.answers["/c.png"] = serves(PNG)
    assert fetch(f"{server.url}/old/a.png", LOCAL) == PNG
    assert server.requests == ["/old/a.png", "/new/b.png?x=1", "/c.png"]


def test_five_redirects_pass_and_six_do_not(server):
    for step in range(1, 7):
        server.answers[f"/{step}"] = redirects(f"/{step - 1}")
    server.answers["/0"] = serves(PNG)
    assert fetch(f"{server.url}/5", LOCAL) == PNG
    assert failure(fetch, f"{server.url}/6", LOCAL)[0].reason == "too many redirects"


def test_a_redirect_loop_ends(server):
    server.answers["/a.png"], server.answers["/b.png"] = redirects("/b.png"), redirects("/a.png")
    error, _ = failure(fetch, f"{server.url}/a.png", LOCAL)
    assert error.reason == "too many redirects" and error.name == f"{server.url}/a.png"
    assert len(server.requests) == 6


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:image/png;base64,AAAA"])
def test_a_redirect_stays_on_the_web(server, to):
    server.answers["/a.png"] = redirects(to)
    error, _ = failure(fetch, f"{server.url}/a.png", LOCAL)
    assert error.reason == "no http(s) address" and to in str(error)


# ---- private addresses ----

PRIVATE = [
    "127.0.0.1",
    "localhost",
    "127.1",
    "2130706433",
    "0x7f.0.0.1",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "169.254.169.254",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[fd00::1]",
    "[fe80::1]",
    "[ff02::1]",
]
# An IPv4 address inside of an IPv6 one, where a gateway may take it out again, and the older private networks.
WRAPPED = ["[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::1]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[fec0::1]"]


def assert_refused_unasked(url: str, network: Network):
    error, _ = failure(fetch, url)
    assert error.reason == "private address"
    assert "allow_private_addresses" in str(error)
    assert network.connected == []


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused_unasked(network, server, host):
    server.answers["/a.png"] = serves(PNG)
    assert_refused_unasked(f"http://{host}:{server.server_port}/a.png", network)
    assert server.connections == 0


@pytest.mark.parametrize("host", ["[::1]", "[::ffff:127.0.0.1]", "[fd00::1]"])
def test_private_addresses_without_a_port_are_refused_unasked(network, host):
    assert_refused_unasked(f"http://{host}/a.png", network)


@pytest.mark.parametrize("host", WRAPPED)
def test_wrapped_private_addresses_are_refused_unasked(network, host):
    assert_refused_unasked(f"http://{host}:80/a.png", network)


@pytest.mark.parametrize("address", ["2606:4700::1111", "::ffff:5db8:d822", "64:ff9b::5db8:d822"])
def test_public_ipv6_addresses_pass_and_need_no_port(network, address):
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    error, _ = failure(fetch, f"http://[{address}]/a.png")
    assert error.reason == "connection failed"  # nobody is there on this network
    assert [ipaddress.ip_address(connected) for connected in network.connected] == [ipaddress.ip_address(address)]


def test_loading_refuses_private_addresses_too(network, server):
    server.answers["/a.png"] = serves(PNG)
    for source in (f"{server.url}/a.png", {"bytes": None, "path": f"{server.url}/a.png"}):
        assert failure(load_rgb_image, source)[0].reason == "private address"
    assert network.connected == []
    load_rgb_image(f"{server.url}/a.png", LOCAL)
    assert network.connected == ["127.0.0.1"]


def test_a_public_host_is_fetched_from_by_its_name(network, server):
    server.answers["/a.png"] = serves(PNG)
    network.resolves(NAME, [PUBLIC])
    assert fetch(f"http://{NAME}:{server.server_port}/a.png") == PNG
    assert network.connected == [PUBLIC]
    assert server.hosts == [f"{NAME}:{server.server_port}"]


def test_the_next_address_is_tried(network, server):
    server.answers["/a.png"] = serves(PNG)
    network.resolves(NAME, [ALSO_PUBLIC, PUBLIC])
    assert fetch(f"http://{NAME}:{server.server_port}/a.png") == PNG
    assert network.connected == [ALSO_PUBLIC, PUBLIC]


@pytest.mark.parametrize("addresses", [[PUBLIC, "10.0.0.1"], ["127.0.0.1", PUBLIC], [PUBLIC, "::1", PUBLIC]])
def test_one_private_address_of_several_is_enough(network, server, addresses):
    server.answers["/a.png"] = serves(PNG)
    network.resolves(NAME, addresses)
    assert_refused_unasked(f"http://{NAME}:{server.server_port}/a.png", network)


def test_a_name_that_changes_its_address_is_not_asked_twice(network, server):
    server.answers["/a.png"] = serves(PNG)
    network.resolves(NAME, [PUBLIC], ["127.0.0.1"])
    assert fetch(f"http://{NAME}:{server.server_port}/a.png") == PNG
    assert network.connected == [PUBLIC]


@pytest.mark.parametrize("host", ["127.0.0.1", "inside.example"])
def test_a_public_host_cannot_redirect_to_a_private_one(network, server, host):
    server.answers["/a.png"] = redirects(f"http://{host}:{server.server_port}/secret.png")
    server.answers["/secret.png"] = serves(PNG)
    network.resolves(NAME, [PUBLIC])
    network.resolves("inside.example", ["127.0.0.1"])
    error, _ = failure(fetch, f"http://{NAME}:{server.server_port}/a.png")
    assert error.reason == "private address" and host in str(error)
    assert server.requests == ["/a.png"] and network.connected == [PUBLIC]


# ---- https ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of NAME's that vouches for itself."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2".split()
    extensions = ["-addext", f"subjectAltName=DNS:{NAME}", "-addext", "keyUsage=digitalSignature,keyCertSign"]
    command = ["openssl", "req", *options, "-subj", f"/CN={NAME}", *extensions, "-keyout", "-", "-out", "-"]
    path.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    return path


@pytest.fixture
def tls_server(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with image_server(context) as server:
        server.answers["/a.png"] = serves(PNG)
        yield server


def test_https_checks_the_certificate_and_its_name(network, tls_server, certificate, monkeypatch):
    network.resolves(NAME, [PUBLIC])
    network.resolves("other.example", [PUBLIC])
    error, _ = failure(fetch, f"https://{NAME}:{tls_server.server_port}/a.png")
    assert error.reason == "connection failed" and "CERTIFICATE_VERIFY_FAILED" in str(error)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetch(f"https://{NAME}:{tls_server.server_port}/a.png") == PNG
    error, _ = failure(fetch, f"https://other.example:{tls_server.server_port}/a.png")
    assert error.reason == "connection failed" and "CERTIFICATE_VERIFY_FAILED" in str(error)
    assert tls_server.requests == ["/a.png"]


def test_https_addresses_are_checked(network, tls_server):
    assert_refused_unasked(f"https://127.0.0.1:{tls_server.server_port}/a.png", network)


@pytest.mark.parametrize("start", [head()[:-2] + b"X-Slow: ", head()], ids=["header", "body"])
def test_https_dripping_does_not_stretch_the_time(network, tls_server, certificate, monkeypatch, start):
    tls_server.answers["/a.png"] = sends(start, b"x", every=0.02)
    network.resolves(NAME, [PUBLIC])
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert_timed_out(f"https://{NAME}:{tls_server.server_port}/a.png", ImageLimits(timeout=TIMEOUT))
    assert tls_server.requests == ["/a.png"]


# ---- data: URLs ----


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_data_urls_are_decoded():
    assert fetch(data_url(PNG)) == PNG
    assert fetch("DATA" + data_url(PNG)[4:]) == PNG
    assert fetch("data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)) == PNG
    assert load_rgb_image(data_url(PNG)).size == (12, 10)


@pytest.mark.parametrize("url", ["data:;base64,AAA", "data:;base64,AA*A", "data:;base64,%C3%A4", "data:image/png"])
def test_broken_data_urls_are_refused(url):
    for read in (fetch, load_rgb_image):
        error, _ = failure(read, url)
        assert error.reason == "broken data: URL" and url in str(error)


def test_data_urls_have_a_size():
    most = b"x" * SMALL.max_bytes
    for good in (data_url(most), "data:," + "x" * len(most), "data:," + "%78" * len(most)):
        assert fetch(good, SMALL) == most
    for bad in (data_url(most + b"x"), "data:," + "x" * 1001, "data:," + "%78" * 1001, "data:;base64," + "*" * 9000):
        error, _ = failure(fetch, bad, SMALL)
        assert error.reason == "too large"
        assert len(str(error)) < 500  # the message does not repeat it all


# ---- decoding ----


def test_an_html_page_is_no_image(server):
    server.answers["/a.png"] = serves(b"<!doctype html><html><body>Please log in</body></html>")
    error, _ = failure(load_rgb_image, f"{server.url}/a.png", LOCAL)
    assert error.reason == "no image" and f"{server.url}/a.png" in str(error)


def test_max_pixels_is_the_last_size_that_passes(server, tmp_path):
    limits = ImageLimits(max_pixels=100, allow_private_addresses=True)
    for name, data in (("most.png", png(20, 5)), ("more.png", png(101, 1))):
        (tmp_path / name).write_bytes(data)
        server.answers[f"/{name}"] = serves(data)
    for folder in (server.url, str(tmp_path)):
        assert load_rgb_image(f"{folder}/most.png", limits).size == (20, 5)
        error, _ = failure(load_rgb_image, f"{folder}/more.png", limits)
        assert error.reason == "too many pixels" and "more.png" in str(error)
    for source in (tmp_path / "more.png", {"bytes": png(101, 1), "path": None}, data_url(png(101, 1))):
        assert failure(load_rgb_image, source, limits)[0].reason == "too many pixels"


@pytest.mark.parametrize("side", [8_000, 60_000])  # Pillow itself warns from 9,459 on and refuses from 13,377 on
def test_pixels_are_counted_before_they_are_decoded(side):
    header = PNG[12:16] + struct.pack(">II", side, side) + PNG[24:29]
    bomb = PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]
    error, _ = failure(load_rgb_image, {"bytes": bomb, "path": "bomb.png"})
    assert error.reason == "too many pixels" and "bomb.png" in str(error)


def test_half_a_file_is_broken(server, tmp_path):
    half = PNG[: len(PNG) // 2]
    (tmp_path / "half.png").write_bytes(half)
    server.answers["/half.png"] = serves(half)
    for source in (tmp_path / "half.png", f"{server.url}/half.png", {"bytes": half, "path": "half.png"}):
        error, _ = failure(load_rgb_image, source, LOCAL)
        assert error.reason == "broken" and "half.png" in str(error)
    assert failure(load_rgb_image, {"bytes": half})[0].name == "in memory"


def test_what_a_decoder_does_not_know_is_broken():
    # A DDS file whose pixels have no format: Pillow raises NotImplementedError, and for some AVIF files RuntimeError.
    parts = [struct.pack("<7I", 124, 0x1007, 10, 10, 0, 0, 0), bytes(44), struct.pack("<8I", 32, *[0] * 7), bytes(20)]
    source = {"bytes": b"DDS " + b"".join(parts) + bytes(400), "path": "a.dds"}
    error, _ = failure(load_rgb_image, source, ImageLimits(formats=("DDS",)))
    assert error.reason == "broken" and error.name == "a.dds"


def test_a_missing_file_is_named(tmp_path):
    missing = tmp_path / "missing.png"
    for source in (missing, str(missing), {"bytes": None, "path": str(missing)}):
        error, _ = failure(load_rgb_image, source)
        assert error.reason == "not found" and str(missing) in str(error)


@pytest.mark.parametrize("source", [{"bytes": None, "path": None}, {"bytes": b""}], ids=str)
def test_no_source_at_all_is_unreadable(source):
    failure(load_rgb_image, source)


def test_file_urls_are_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    assert load_rgb_image(str(path)).size == (12, 10)
    for url in (path.as_uri(), path.as_uri().replace("file", "FILE"), f"file:{path}"):
        for source in (url, {"bytes": None, "path": url}):
            error, _ = failure(load_rgb_image, source)
            assert error.reason == "file: URLs are refused" and url in str(error)


def test_what_is_a_url():
    for source in ("http://a/b", "https://a/b", "HTTPS://a/b", "data:,", "Data:image/png;base64,AAAA"):
        assert is_url(source)
    for source in ("a.png", "/http://a", "file:///a", "ftp://a", "https.png", Path("http://a"), b"http://a", None, 1):
        assert not is_url(source)


def test_a_password_is_not_repeated():
    with pytest.raises(UnreadableImageError) as caught:
        fetch("http://someone:secret@127.0.0.1/cat.png")
    assert "secret" not in str(caught.value) and "127.0.0.1/cat.png" in str(caught.value)


def test_a_pil_image_is_held_to_the_limit_too():
    with pytest.raises(UnreadableImageError, match="too many pixels"):
        load_rgb_image(Image.new("RGB", (20, 20)), ImageLimits(max_pixels=100))


def test_the_web_gives_no_postscript():
    page = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n").decode()
    with pytest.raises(UnreadableImageError, match="no image"):
        load_rgb_image(f"data:application/postscript;BASE64,{page}")


def test_thin_images_are_refused():
    """Resizing the short side of one to an encoder's 224 pixels takes gigabytes."""
    with pytest.raises(UnreadableImageError, match="too thin"):
        load_rgb_image(Image.new("RGB", (1, 2000)))
    assert load_rgb_image(Image.new("RGB", (1, 100))).size == (1, 100)


def test_what_is_no_image_at_all():
    for source in (3, None, [1, 2]):
        with pytest.raises(UnreadableImageError, match="no image"):
            load_rgb_image(source)
