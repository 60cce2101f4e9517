"""A real S3 server on loopback, and a bad network in front of it."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from helpers.web import Loopback, Quiet

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def server(log: Path) -> Iterator[str]:
    """Its URL, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | KEYS)
    try:
        limit = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < limit, log.read_text()
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def forget() -> None:
    """fsspec keeps file systems, which keep their connections: another endpoint needs new ones."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def files(path: str) -> dict[str, int]:
    """Size of every object under bucket/key."""
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    return {name: entry["size"] for name, entry in fs.find(path, detail=True).items()}


class BadNetwork(Loopback):
    """A proxy to `target` that answers a request as `verdict(method, path)` says: "pass", "fail"
    (503), "drop" (no answer), "cut" (half of the body), "stop" (half of the body, and then
    silence), "silent" (not a byte), or "deaf" (not a byte, and none of the request's body is
    read)."""

    def __init__(self, target: str, verdict: Callable[[str, str], str]) -> None:
        self.verdict, self.asked = verdict, list[tuple[str, str]]()
        host = target.removeprefix("http://")
        over, network = threading.Event(), self

        class Handler(Quiet):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                verdict = network.verdict(self.command, self.path)
                network.asked.append((self.command, self.path))
                self.close_connection = True
                if verdict == "deaf":
                    over.wait()
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if verdict == "silent":
                    over.wait()
                    return
                if verdict == "drop":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if verdict == "fail":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.send_header("Connection", "close")
                    self.end_headers()
                    return
                through = http.client.HTTPConnection(host, timeout=30)
                through.request(self.command, self.path, body, dict(self.headers))
                answer = through.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in (
                        "connection",
                        "transfer-encoding",
                        "content-length",
                        "date",
                        "server",
                    ):
                        self.send_header(name, value)
                length = (
                    answer.getheader("Content-Length")
                    if self.command == "HEAD"
                    else str(len(content))
                )
                self.send_header("Content-Length", length or "0")
                self.send_header("Connection", "close")
                self.end_headers()
                half = verdict in ("cut", "stop")
                self.wfile.write(content[: len(content) // 2] if half else content)
                if verdict == "stop":
                    over.wait()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

        super().__init__(Handler, over)
        self.url = f"http://{self.host}"
