"""What this deployment can recognise later as its own: job ids and the addresses of files."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

_MAC_CHARS = 16


class Signer:
    """secret: shared by all processes of a deployment; a random one lives as long as the process."""

    def __init__(self, secret: str | None = None) -> None:
        self._secret = (secret or secrets.token_hex(32)).encode()

    def new_job_id(self, tenant: str) -> str:
        """Random, and recognisable for this tenant alone."""
        random = secrets.token_hex(8)
        return random + self._mac("job", tenant, random)

    def made_job_id(self, tenant: str, job_id: str) -> bool:
        """Whether this is the id of a job that this tenant was given."""
        random, mac = job_id[:16], job_id[16:]
        return hmac.compare_digest(self._mac("job", tenant, random).encode(), mac.encode())

    def sign_file(self, key: str, ttl_s: float) -> tuple[int, str]:
        """Until when, in seconds since 1970, the file may be had without an API key, and the proof of it."""
        expires = int(time.time() + ttl_s)
        return expires, self._mac("file", key, str(expires), chars=64)

    def signed_file(self, key: str, expires: str, signature: str) -> bool:
        """Whether ``sign_file`` gave these, long ago or not."""
        expected = self._mac("file", key, expires, chars=64)
        return hmac.compare_digest(expected.encode(), signature.encode())

    def _mac(self, *parts: str, chars: int = _MAC_CHARS) -> str:
        text = "\n".join(parts).encode("utf-8", "backslashreplace")
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[:chars]
