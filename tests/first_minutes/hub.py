#!/usr/bin/env python3
"""A Hugging Face hub on loopback with one model, org/name, from a directory: enough of it to be fetched from. Prints its address.

    hub.py DIRECTORY org/name"""

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DIRECTORY, MODEL = Path(sys.argv[1]), sys.argv[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        if self.path.startswith(f"/api/models/{MODEL}/revision/"):
            files = [{"rfilename": path.name} for path in sorted(DIRECTORY.iterdir())]
            self.answer(200, {}, json.dumps({"sha": COMMIT, "siblings": files}).encode())
            return
        file = DIRECTORY / self.path.rsplit("/", 1)[-1]
        if not self.path.startswith(f"/{MODEL}/resolve/") or not file.is_file():
            self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
            return
        body = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        span = self.headers.get("Range")
        if not span:
            self.answer(200, headers, body)
            return
        first, last = span.removeprefix("bytes=").split("-")
        part = body[int(first) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        self.answer(206, headers, part)

    do_HEAD = do_GET


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
