#!/usr/bin/env bash
# Over http, fsspec calls a file missing when its server fails.
#
# Versions: fsspec 2026.9.0, aiohttp 3.14.5. Seen 2026-11-30.
# A good guess: FileNotFoundError means that the server answered 404; an overloaded server (503) or
# one that refuses the connection raises an error of its own, so that a retry is possible and "is it
# there?" is not answered.
# What it does: `info`, and so `size`, `open` and `exists`, turn every failure into FileNotFoundError
# or False; only `cat`, which asks nothing before it reads, tells the 503. A list of shards that is
# filtered by `exists`, or a loop that skips missing files, loses data while a server is busy.
# Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q fsspec==2026.9.0 aiohttp==3.14.5
"$work/env/bin/python" - <<'PYTHON'
import http.server
import socket
import threading

import fsspec


class Busy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(503)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
threading.Thread(target=server.serve_forever, daemon=True).start()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    closed = free.getsockname()[1]

fs = fsspec.filesystem("http", skip_instance_cache=True)
seen = {}
for name, port in (("503", server.server_port), ("connection refused", closed)):
    url = f"http://127.0.0.1:{port}/shard-00000.tar"
    for call in ("info", "exists", "open", "cat"):
        try:
            seen[name, call] = getattr(fs, call)(url)
        except Exception as error:
            seen[name, call] = type(error).__name__
        print(f"{name:<20} {call:<7} {seen[name, call]}")
for name in ("503", "connection refused"):
    assert seen[name, "info"] == "FileNotFoundError", name
    assert seen[name, "exists"] is False, name
    assert seen[name, "open"] == "FileNotFoundError", name
assert seen["503", "cat"] == "ClientResponseError"
PYTHON
