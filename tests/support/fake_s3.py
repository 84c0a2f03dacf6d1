"""The part of S3 that a result store uses, on loopback: objects by path, lists, and signatures that are checked.

Signatures are computed here anew, in headers and in presigned addresses alike.
Source: AWS Signature Version 4, "Create a signed request"; Amazon S3 API reference.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

KEY_ID, SECRET_KEY, REGION, BUCKET = "an-access-key", "a-secret-key", "eu-central-7", "pictures"
_STAMP = "%Y%m%dT%H%M%SZ"


class FakeS3:
    """objects: (content, content type) by key; down: answers 503 to everything; refused: requests turned away."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.down = False
        self.refused = 0
        self.url = ""

    def environment(self) -> dict[str, str]:
        """What a client of this store has in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }

    def answer(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers."""
        if self.down:
            return 503, b"<Error><Code>ServiceUnavailable</Code></Error>", {}
        if not _signed(method, target, headers):
            self.refused += 1
            return 403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>", {}
        parts = urlsplit(target)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if bucket != BUCKET:
            return 404, b"<Error><Code>NoSuchBucket</Code></Error>", {}
        if "list-type" in query:
            return 200, self._list(query), {"content-type": "application/xml"}
        if method == "POST" and "delete" in query:
            names = re.findall(r"<Key>(.*?)</Key>", body.decode())
            for name in names:
                self.objects.pop(unescape(name), None)
            deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            return 200, f"<DeleteResult>{deleted}</DeleteResult>".encode(), {"content-type": "application/xml"}
        return self._object(method, key, headers, body)

    def _object(
        self, method: str, key: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        if method == "PUT":
            self.objects[key] = (body, headers.get("content-type", ""))
            return 200, b"", {"etag": '"1"'}
        if method == "DELETE":
            self.objects.pop(key, None)
            return 204, b"", {}
        if key not in self.objects:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
        content, kind = self.objects[key]
        stamp = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        return 200, content, {"content-type": kind, "etag": '"1"', "last-modified": stamp}

    def _list(self, query: Mapping[str, str]) -> bytes:
        prefix, found, folders = query.get("prefix", ""), "", set()
        for key, (content, _) in sorted(self.objects.items()):
            if not key.startswith(prefix):
                continue
            rest, slash, _ = key[len(prefix) :].partition("/")
            if query.get("delimiter") and slash:
                folders.add(prefix + rest + "/")
                continue
            found += f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            found += f"<ETag>1</ETag><Size>{len(content)}</Size></Contents>"
        common = "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in folders)
        return f"<ListBucketResult>{found}{common}<IsTruncated>false</IsTruncated></ListBucketResult>".encode()


@contextmanager
def fake_s3() -> Iterator[FakeS3]:
    store = FakeS3()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            named = {name.lower(): value for name, value in self.headers.items()}
            status, content, headers = store.answer(self.command, self.path, named, body)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_DELETE(self) -> None:
            self._answer()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _signed(method: str, target: str, headers: Mapping[str, str]) -> bool:
    """Whether the request was signed with our key, and if it is presigned, is still good."""
    parts = urlsplit(target)
    query = parse_qsl(parts.query, keep_blank_values=True)
    asked = dict(query)
    if "X-Amz-Signature" in asked:
        sent, names, stamp = asked["X-Amz-Signature"], asked["X-Amz-SignedHeaders"], asked["X-Amz-Date"]
        credential, payload = asked["X-Amz-Credential"], "UNSIGNED-PAYLOAD"
        begun = datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC)
        if datetime.now(UTC) > begun + timedelta(seconds=int(asked["X-Amz-Expires"])):
            return False
        query = [pair for pair in query if pair[0] != "X-Amz-Signature"]
    else:
        found = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=(\S+), SignedHeaders=(\S+), Signature=(\S+)",
            headers.get("authorization", ""),
        )
        if found is None:
            return False
        credential, names, sent = found.groups()
        stamp, payload = headers["x-amz-date"], headers["x-amz-content-sha256"]
    scope = f"{stamp[:8]}/{REGION}/s3/aws4_request"
    if credential != f"{KEY_ID}/{scope}":
        return False
    pairs = sorted((quote(name, safe="-_.~"), quote(value, safe="-_.~")) for name, value in query)
    listed = "".join(f"{name}:{' '.join(headers.get(name, '').split())}\n" for name in names.split(";"))
    canonical = "\n".join(
        [method, parts.path, "&".join(f"{name}={value}" for name, value in pairs), listed, names, payload]
    )
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{SECRET_KEY}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return hmac.compare_digest(hmac.new(key, text.encode(), hashlib.sha256).hexdigest(), sent)
