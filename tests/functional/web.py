# SPDX-License-Identifier: Apache-2.0
"""Web servers for tests: a real nginx, and one that misbehaves on purpose."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NGINX_CONFIG = """\
daemon off;
worker_processes 1;
{user}
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    log_format requests '$status|$http_range|$http_if_range|$http_authorization|$uri';
    access_log {folder}/access.log requests;
    client_body_temp_path {folder}/temporary;
    proxy_temp_path {folder}/temporary;
    fastcgi_temp_path {folder}/temporary;
    uwsgi_temp_path {folder}/temporary;
    scgi_temp_path {folder}/temporary;
    server {{
        listen 127.0.0.1:{port};
        {tls}
        root {folder}/www;
        location /slow/ {{ alias {folder}/www/; limit_rate_after 1m; limit_rate 1m; }}
        location /stalled/ {{ alias {folder}/www/; limit_rate_after 1m; limit_rate 1; }}
        location /dated/ {{ alias {folder}/www/; etag off; limit_rate_after 1m; limit_rate 1m; }}
        location /private/ {{
            alias {folder}/www/; auth_basic private; auth_basic_user_file {folder}/passwords;
        }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
        location /elsewhere/ {{ return 302 {elsewhere}/image; }}
        location /fragile/ {{ if (-f {folder}/down) {{ return 503; }} alias {folder}/www/; }}
        {forwarding}
        location /compressed/ {{ alias {folder}/www/; add_header Content-Encoding gzip; }}
    }}
}}
"""


def listen() -> socket.socket:
    """A listening socket on a free loopback port above 40000."""
    while True:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", random.randrange(40001, 60000)))
        except OSError:
            listener.close()
            continue
        listener.listen(64)
        return listener


class Nginx:
    """A real nginx that serves the folder ``www``; the test holds its socket, so that it can be killed and restarted.

    :param tls: the certificate and the key, for HTTPS.
    :param elsewhere: the URL that ``/elsewhere/`` redirects to.
    :param behind: the URL of the server that answers for ``/behind/``.

    :ivar url: where it listens, without a slash at the end.
    """

    def __init__(
        self, folder: Path, *, tls: tuple[Path, Path] | None = None, elsewhere: str = "", behind: str = ""
    ) -> None:
        self.folder = folder
        (folder / "www").mkdir(parents=True)
        (folder / "passwords").write_text("agent:{PLAIN}se cret\n")
        self._listener = listen()
        port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        config = _NGINX_CONFIG.format(
            folder=folder,
            port=port,
            user="user root;" if os.geteuid() == 0 else "",
            tls=f"ssl_certificate {tls[0]}; ssl_certificate_key {tls[1]};" if tls else "",
            elsewhere=elsewhere,
            forwarding=f"location /behind/ {{ proxy_pass {behind}/; proxy_buffering off; }}" if behind else "",
        )
        if tls:
            config = config.replace(f":{port};", f":{port} ssl;")
        (folder / "nginx.conf").write_text(config)
        self.start()

    def start(self) -> None:
        # nginx takes over sockets that it is told of in this way, so requests wait in the queue until it is there.
        descriptor = self._listener.fileno()
        with (self.folder / "output.log").open("ab") as output:
            self._process = subprocess.Popen(
                ["/usr/sbin/nginx", "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")],
                env={"NGINX": f"{descriptor};"},
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End it at once, which cuts every connection; its worker is waited for by nginx itself."""
        self._stop(signal.SIGTERM)

    def close(self) -> None:
        self.kill()
        self._listener.close()

    def _stop(self, how: signal.Signals) -> None:
        self._process.send_signal(how)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise

    def put(self, name: str, content: bytes) -> str:
        """Publish a file under a name, replacing what was there, and return its sha256."""
        partial = self.folder / "partial"
        partial.write_bytes(content)
        os.replace(partial, self.folder / "www" / name)
        return hashlib.sha256(content).hexdigest()

    def requests(self) -> list[list[str]]:
        """Status, Range, If-Range, Authorization and path of each request that was answered, in order.

        nginx ends first: it notes a request only after the client has got its answer.
        """
        self._stop(signal.SIGQUIT)
        return [line.split("|") for line in (self.folder / "access.log").read_text().splitlines()]


@contextlib.contextmanager
def nginx(folder: Path, **options: Any) -> Iterator[Nginx]:
    """An nginx for the block, with a folder of its own; the options are those of :class:`Nginx`."""
    server = Nginx(folder, **options)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """A port on which nobody listens, and nobody can start to."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def make_certificate(folder: Path, address: str = "127.0.0.1") -> tuple[Path, Path]:
    """A certificate for an address, signed by itself, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    key_type = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=test", "-addext", f"subjectAltName=IP:{address}"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-days", "2", *key_type, *names, *files]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key


@dataclass
class Request:
    """A request, as it came in: the first line and the header fields by their names in lower case."""

    line: str
    headers: dict[str, str] = field(default_factory=dict)


#: Answers one request on an open connection, which is closed afterwards.
Answer = Callable[[socket.socket, Request], None]


class MisbehavingServer:
    """Gives each connection the next answer of a list, and the last one again when they are used up.

    :ivar requests: what has been asked so far.
    :ivar gone: set when the other end has closed a connection on which an answer waited for that.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.requests: list[Request] = []
        self.gone = threading.Event()
        self._answers = list(answers)
        self._connection: socket.socket | None = None
        self._listener = listen()
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve, name="misbehaving-server")
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        connection = self._connection
        if connection is not None:
            # An answer that is still sending is not always told by the kernel that nobody listens any more.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def wait_until_gone(self, connection: socket.socket, request: Request) -> None:
        """Wait until the other end closes the connection, but not for ever, for answers that stall."""
        del request
        connection.settimeout(10)
        with contextlib.suppress(TimeoutError):
            with contextlib.suppress(ConnectionError):
                while connection.recv(4096):
                    pass
            self.gone.set()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connection = connection
            with connection, contextlib.suppress(ConnectionError):
                request = _read_request(connection)
                if request is None:
                    continue
                answer = self._answers[min(len(self.requests), len(self._answers) - 1)]
                self.requests.append(request)
                answer(connection, request)


@contextlib.contextmanager
def misbehaving_server(*answers: Answer) -> Iterator[MisbehavingServer]:
    """A server that gives these answers, for the block."""
    server = MisbehavingServer(answers)
    try:
        yield server
    finally:
        server.close()


def respond(status: str, body: bytes = b"", **headers: str) -> Answer:
    """An answer of a status, these header fields (``content_length="5"``), and a body, then the end."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    message = "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def answer(connection: socket.socket, request: Request) -> None:
        del request
        connection.sendall(message)

    return answer


def tunnel(connection: socket.socket, request: Request) -> None:
    """The answer of a proxy to CONNECT: pass on what comes, both ways, until one side ends."""
    host, _, port = request.line.split()[1].rpartition(":")
    with socket.create_connection((host, int(port))) as other:
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        ends = {connection: other, other: connection}
        while True:
            for end in select.select(list(ends), [], [])[0]:
                piece = end.recv(65536)
                if not piece:
                    return
                ends[end].sendall(piece)


def _read_request(connection: socket.socket) -> Request | None:
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(65536)
        if not piece:
            return None
        received += piece
    first, *lines = received.decode("latin-1").split("\r\n\r\n")[0].split("\r\n")
    fields = (line.partition(":") for line in lines)
    return Request(first, {name.lower(): value.strip() for name, _, value in fields})
