"""What this deployment can recognise later as its own: the ids of its jobs, and the addresses of its files.

And the keys by which receivers of webhooks recognise it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

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

    def sign_file(self, key: str, expires: int) -> str:
        """What opens the file of this key until ``expires``, in seconds since 1970."""
        return self._digest("file", key, str(expires))

    def signed_file(self, key: str, expires: int, signature: str) -> bool:
        return hmac.compare_digest(self.sign_file(key, expires).encode(), signature.encode("utf-8", "replace"))

    def webhook_key(self, tenant: str) -> bytes:
        """What a tenant's webhooks are signed with: of no use for ids, addresses or other tenants' webhooks."""
        return hmac.new(self._secret, f"webhook\n{tenant}".encode(), hashlib.sha256).digest()

    def webhook_secret(self, tenant: str) -> str:
        """The tenant's key as Standard Webhooks write it, for receivers."""
        return f"whsec_{base64.b64encode(self.webhook_key(tenant)).decode('ascii')}"

    def _mac(self, *parts: str) -> str:
        return self._digest(*parts)[:_MAC_CHARS]

    def _digest(self, *parts: str) -> str:
        text = "\n".join(parts).encode("utf-8", "backslashreplace")
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()
