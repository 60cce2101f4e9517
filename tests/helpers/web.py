"""A real HTTP server on loopback whose answers stop on the way, and one of raw sockets that never
answers."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qsl

PIECES = 10  # of an answer that trickles


class Loopback:
    """A server of these handlers on a free port, while it is entered. What they hold back waits for
    `over`, which is set at the end."""

    def __init__(self, handler: type[BaseHTTPRequestHandler], over: threading.Event) -> None:
        self._over, self._server = over, ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


class Quiet(BaseHTTPRequestHandler):
    """A handler that logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


class Web(Loopback):
    """Serves `files` by their paths, whole or a range, also in words of WebHDFS, as
    `verdict(number, method, path)` says of the request of this number: "pass", "stop" (half of the
    body, and then silence), "silent" (not a byte), or "trickle" (in PIECES, `pause` seconds
    apart)."""

    def __init__(
        self,
        files: Mapping[str, bytes],
        verdict: Callable[[int, str, str], str] = lambda *_: "pass",
        pause: float = 0.0,
    ) -> None:
        self.asked: list[tuple[str, str, int]] = []  # method, path, first byte
        over, web = threading.Event(), self

        class Handler(Quiet):
            def handle_one(self) -> None:
                path, _, query = self.path.partition("?")
                whole = files.get(path.removeprefix("/webhdfs/v1"))
                given = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
                start = int(given[1]) if given else 0
                web.asked.append((self.command, self.path, start))
                said = verdict(len(web.asked), self.command, self.path)
                words = dict(parse_qsl(query))
                if whole is not None and words.get("op") == "GETFILESTATUS":
                    status = {"type": "FILE", "length": len(whole), "modificationTime": 1}
                    whole = json.dumps({"FileStatus": status}).encode()
                elif whole is not None and words.get("op") == "OPEN":
                    first = int(words["offset"])
                    whole = whole[first : first + int(words["length"])]
                if said == "silent":
                    over.wait()
                    return
                if whole is None:
                    self.send_error(404)
                    return
                end = min(int(given[2]) + 1 if given and given[2] else len(whole), len(whole))
                body = whole[start:end]
                self.send_response(206 if given else 200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Accept-Ranges", "bytes")
                if given:
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(whole)}")
                self.end_headers()
                if self.command == "HEAD":
                    return
                if said == "stop":
                    self.wfile.write(body[: len(body) // 2])
                    over.wait()
                elif said == "trickle":
                    step = -(-len(body) // PIECES)
                    for place in range(0, len(body), step):
                        over.wait(pause)
                        self.wfile.write(body[place : place + step])
                else:
                    self.wfile.write(body)

            do_GET = do_HEAD = handle_one

        super().__init__(Handler, over)


class Listener:
    """A port that takes connections and sends each `greeting`, and then nothing."""

    def __init__(self, port: int, came: threading.Event) -> None:
        self.port, self.came = port, came


@contextmanager
def listening(greeting: bytes = b"") -> Iterator[Listener]:
    came, kept = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                kept.append(connection)
                came.set()
                connection.sendall(greeting)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield Listener(server.getsockname()[1], came)
        finally:
            # Wakes `accept`, which closing alone does not.
            server.shutdown(socket.SHUT_RDWR)
            for connection in kept:
                connection.close()


@contextmanager
def full() -> Iterator[int]:
    """A port whose queue of connections is full: none is taken."""
    waiting = [socket.socket() for _ in range(4)]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        try:
            yield server.getsockname()[1]
        finally:
            for one in waiting:
                one.close()


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0
