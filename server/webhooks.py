"""Telling a client's server that a job has ended: from the store's outbox, signed, until it says it heard.

Signature: Standard Webhooks 1.0: ``webhook-signature: v1,`` and the base64 HMAC-SHA256 of ``id.timestamp.body``,
by a key of the job's tenant.
An address must be under an allowed origin. Its host is resolved once, and that very address is connected to; one
that is not public must lie in an allowed network. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import socket
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import structlog

from server.errors import InvalidRequestError
from server.jobs import Delivery
from server.links import FileLinks
from server.signing import Signer
from server.stores.base import JobStore, StoreUnavailableError, UnreadableJobError

MAX_ATTEMPTS = 12
MAX_AGE_S = 24 * 3600.0
"""After the end of its job a message is given up, sent as often or not."""

TIMEOUT_S = 10.0
_LOOK_S = 1.0
_AT_ONCE = 8
_ORIGIN_HANGS = "origin_hangs"
_FIRST_DELAY_S = 2.0
_LONGEST_DELAY_S = 3600.0
_log = structlog.get_logger()

_Origin = tuple[str, str, int]
"""Scheme, host and port."""


class RefusedAddressError(Exception):
    """The host of a webhook has no address that may be connected to."""


class Webhooks:
    """allow: origins such as ``https://hooks.example.com``, and networks such as ``10.0.0.0/8``.

    links: to stored files, for messages to name them. Of an origin whose last answer did not come in time, one
    message is under way at a time and the others are put off, so that it leaves the other origins room.
    """

    def __init__(
        self, allow: Sequence[str], signer: Signer, store: JobStore, links: FileLinks | None = None
    ) -> None:
        self._origins = {_origin(httpx.URL(entry)) for entry in allow if "://" in entry}
        self._networks = [ipaddress.ip_network(entry) for entry in allow if "://" not in entry]
        self._signer = signer
        self._store = store
        self._links = links
        self._resolving = ThreadPoolExecutor(_AT_ONCE, "webhook-names")  # a slow name takes no other work's thread
        self._free = asyncio.Semaphore(_AT_ONCE)
        self._under_way: Counter[_Origin] = Counter()
        self._hanging: set[_Origin] = set()

    def check(self, url: str) -> None:
        """Raises: InvalidRequestError when the server may not send there."""
        message = "webhook_url must start with one of the origins this server allows (HALFSTEP_WEBHOOK_ALLOW)."
        try:
            parsed = httpx.URL(url)
            allowed = _origin(parsed) in self._origins and not parsed.userinfo
        except (httpx.InvalidURL, ValueError):
            allowed = False
        if not allowed:
            raise InvalidRequestError("webhook_not_allowed", message, param="webhook_url")

    async def run(self) -> None:
        """Send what is due until cancelled."""
        if not self._origins:
            return
        async with _client() as client, asyncio.TaskGroup() as sending:
            while True:
                if not await self._begin_next(client, sending):
                    await asyncio.sleep(_LOOK_S)

    async def flush(self) -> None:
        """Send what is due now, once, and wait for what is under way; at most TIMEOUT_S for all of it.

        Nothing is sent afterwards.
        """
        if not self._origins:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT_S), _client() as client:
                async with asyncio.TaskGroup() as sending:
                    while await self._begin_next(client, sending):
                        pass
                for _ in range(_AT_ONCE):  # those that ``run`` began
                    await self._free.acquire()

    async def _begin_next(self, client: httpx.AsyncClient, sending: asyncio.TaskGroup) -> bool:
        """Once fewer than ``_AT_ONCE`` are under way, begin what has been due the longest. Whether anything was."""
        await self._free.acquire()
        due: list[Delivery] = []
        try:
            with suppress(StoreUnavailableError):
                due = await self._store.claim_deliveries(1)
        finally:
            if not due:
                self._free.release()
        for delivery in due:
            sending.create_task(self._deliver(client, delivery)).add_done_callback(lambda _: self._free.release())
        return bool(due)

    async def _deliver(self, client: httpx.AsyncClient, delivery: Delivery) -> None:
        fault = await self._send(client, delivery)
        with suppress(StoreUnavailableError):  # what was not noted down is due again
            await self._note(delivery, fault)

    async def _note(self, delivery: Delivery, fault: str | None) -> None:
        put_off = fault == _ORIGIN_HANGS
        if fault is None:
            await self._store.delivered(delivery)
        elif delivery.age_s > MAX_AGE_S or (delivery.attempt >= MAX_ATTEMPTS and not put_off):
            _log.error("webhook_given_up", job=delivery.job_id, attempts=delivery.attempt, reason=fault)
            await self._store.delivered(delivery)
        else:
            _log.warning("webhook_failed", job=delivery.job_id, attempt=delivery.attempt, reason=fault)
            await self._store.retry_delivery(delivery, _delay_s(delivery, put_off=put_off), put_off=put_off)

    async def _send(self, client: httpx.AsyncClient, delivery: Delivery) -> str | None:
        """None when a 2xx came back, else why not."""
        try:
            self.check(delivery.url)  # the setting may have changed since
        except InvalidRequestError:
            return "not_allowed"
        origin = _origin(httpx.URL(delivery.url))
        if origin in self._hanging and self._under_way[origin]:
            return _ORIGIN_HANGS
        self._under_way[origin] += 1
        try:
            status = await self._post(client, delivery)
        except (TimeoutError, httpx.TimeoutException):
            self._hanging.add(origin)
            return "timed_out"
        except (httpx.HTTPError, OSError, RefusedAddressError, UnreadableJobError) as error:
            return type(error).__name__
        finally:
            self._under_way[origin] -= 1
        self._hanging.discard(origin)
        return None if 200 <= status < 300 else f"status_{status}"

    async def _post(self, client: httpx.AsyncClient, delivery: Delivery) -> int:
        """The status that came back."""
        content = json.dumps(await self._message(delivery)).encode()
        url = httpx.URL(delivery.url)
        async with asyncio.timeout(TIMEOUT_S):  # of all of it: the client's own is of each part
            address = await self._address(url)
            key = self._signer.webhook_key(delivery.tenant)
            headers = {**signed(key, delivery.job_id, content), "host": url.netloc.decode("ascii")}
            post = client.stream(
                "POST",
                url.copy_with(host=address),
                content=content,
                headers={**headers, "content-type": "application/json"},
                extensions={"sni_hostname": url.host},
            )
            async with post as response:  # whose body may have no end, and is not read
                return response.status_code

    async def _message(self, delivery: Delivery) -> dict[str, Any]:
        """Of stored files, while there are any, it says where. Raises: OSError when one of the stores is away."""
        told = {
            "type": "job.ended",
            "id": delivery.job_id,
            "status": delivery.status,
            "ended": int(delivery.ended_s),
        }
        state = None if self._links is None else await self._store.get(delivery.job_id)
        if self._links is None or state is None or state.result is None or not state.job.request.stored:
            return told
        images: list[dict[str, Any]] = []
        for index, image in enumerate(state.result.images):
            if image.flagged:
                images.append({"index": index, "seed": image.seed, "flagged": True})
                continue
            link = await self._links.link(image.stored_key(), state.job.base_url)
            images.append({"index": index, "seed": image.seed, "url": link.url, "expires_at": link.expires_at})
        return {**told, "images": images}

    async def _address(self, url: httpx.URL) -> str:
        """Raises: RefusedAddressError; OSError when the name has no address."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._resolving, socket.getaddrinfo, url.host, None)
        for entry in found:
            address = ipaddress.ip_address(str(entry[4][0]).partition("%")[0])
            if address.is_global or any(address in network for network in self._networks):
                return str(address)
        raise RefusedAddressError


def _delay_s(delivery: Delivery, *, put_off: bool) -> float:
    """Twice the last one; of what was not sent, which counts no attempts, as long as it has been waiting."""
    wait_s = delivery.age_s if put_off else _FIRST_DELAY_S * 2 ** (delivery.attempt - 1)
    return min(max(wait_s, _FIRST_DELAY_S), _LONGEST_DELAY_S)


def signed(key: bytes, message_id: str, content: bytes) -> dict[str, str]:
    """Headers by which a receiver knows who sent this, and when."""
    timestamp = str(int(time.time()))
    mac = hmac.new(key, f"{message_id}.{timestamp}.".encode() + content, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{base64.b64encode(mac).decode('ascii')}",
    }


def check_allowed(entry: str) -> str:
    """Raises: ValueError when it is neither an origin nor a network."""
    if "://" not in entry:
        ipaddress.ip_network(entry)
        return entry
    url = httpx.URL(entry)
    if url.scheme not in ("http", "https") or not url.host or url.raw_path not in (b"/", b""):
        raise ValueError("an origin is http:// or https:// and a host, without a path")
    return entry


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False)


def _origin(url: httpx.URL) -> _Origin:
    default = {"http": 80, "https": 443}[url.scheme] if url.scheme in ("http", "https") else 0
    return url.scheme, url.host.lower(), url.port or default
