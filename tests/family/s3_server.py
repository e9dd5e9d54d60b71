"""A server of S3: as much of it as a client needs to read, write, list and remove objects; signatures are not read."""

from __future__ import annotations

import io
import threading
import xml.sax.saxutils
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code: str) -> None:
        self._answer(404, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _asked(self) -> tuple[str, str, dict[str, str]] | None:
        """Bucket, key and arguments; None after the refusal of a bucket that is not there."""
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        self.sent = self._body()
        if bucket != self.server.bucket:
            self._refuse("NoSuchBucket")
            return None
        found = parse_qs(parts.query, keep_blank_values=True)
        return bucket, key, {name: values[0] for name, values in found.items()}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = _joined(self.rfile)
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return _joined(io.BytesIO(data)) if self.headers.get("Content-Encoding") == "aws-chunked" else data

    def do_GET(self) -> None:
        if (asked := self._asked()) is None:
            return
        _, key, arguments = asked
        if not key:
            self._list(arguments)
        elif (data := self.server.objects.get(key)) is None:
            self._refuse("NoSuchKey")
        elif place := self.headers.get("Range"):
            first, last = (int(number) for number in place.removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            self._answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        else:
            self._answer(200, data)

    def do_HEAD(self) -> None:
        if (asked := self._asked()) is not None:
            data = self.server.objects.get(asked[1]) if asked[1] else b""
            self._answer(404) if data is None else self._answer(200, data, ETag='"x"')

    def do_PUT(self) -> None:
        if (asked := self._asked()) is not None:
            _, key, arguments = asked
            kept = self.server.parts if "uploadId" in arguments else self.server.objects
            kept[key + arguments.get("partNumber", "")] = self.sent
            self._answer(200, ETag='"x"')

    def do_POST(self) -> None:
        """Uploads in several parts: begun, then put together."""
        if (asked := self._asked()) is None:
            return
        _, key, arguments = asked
        if "uploads" in arguments:
            body = "<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
        else:
            numbers = range(1, 1 + self.sent.count(b"<PartNumber>"))
            self.server.objects[key] = b"".join(self.server.parts.pop(f"{key}{number}") for number in numbers)
            body = '<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>'
        self._answer(200, body.encode())

    def do_DELETE(self) -> None:
        if (asked := self._asked()) is not None:
            self.server.objects.pop(asked[1], None)
            self._answer(204)

    def _list(self, arguments: dict[str, str]) -> None:
        start, end = arguments.get("prefix", ""), arguments.get("delimiter")
        files, folders = [], set()
        for key, data in sorted(self.server.objects.items()):
            if key.startswith(start):
                name, inner, _ = key.removeprefix(start).partition(end or "\0")
                folders |= {f"{start}{name}/"} if inner else set()
                files += [] if inner else [(key, len(data))]
        known = "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
        listed = [
            *(f"<Contents><Key>{_text(key)}</Key><Size>{size}</Size>{known}</Contents>" for key, size in files),
            *(f"<CommonPrefixes><Prefix>{_text(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)),
        ]
        count = f"<KeyCount>{len(listed)}</KeyCount><IsTruncated>false</IsTruncated>"
        self._answer(200, f"<ListBucketResult>{count}{''.join(listed)}</ListBucketResult>".encode())


class _Server(ThreadingHTTPServer):
    def __init__(self, bucket: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bucket, self.objects, self.parts = bucket, {}, {}  # type: ignore[var-annotated]


def _joined(stream: BinaryIO) -> bytes:
    """Chunks, each after a line with its size, the last one empty; then lines of checksums, and an empty one."""
    whole = b""
    while size := int(stream.readline().partition(b";")[0], 16):
        whole += stream.read(size)
        stream.readline()
    while stream.readline().strip():
        pass
    return whole


_text = xml.sax.saxutils.escape


@contextmanager
def serving(bucket: str) -> Iterator[str]:
    """The address, HOST:PORT, of a server with one empty bucket, while the block runs."""
    server = _Server(bucket)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
