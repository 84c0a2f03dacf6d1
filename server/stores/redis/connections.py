"""Connections to Redis that answer in time, or count as away."""

from __future__ import annotations

import re

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError

ANSWER_S = 0.8
"""How long a connection, and then an answer, may take before Redis counts as away; for those whose clients wait."""

PATIENT_ANSWER_S = 3.0
"""The same for a worker, which nobody waits for."""

CONNECTIONS = 64

_URL = re.compile(r"rediss?://([^@/?#]*@)?(\[[^]@/?#]*\]|[^]@:/?#[]*)(:\d+)?(/\d*)?(\?[^@#]*)?|unix://.+")
"""The client takes more: what follows a stray / of a password for a path it does not heed, what is before it for a
host, and so part of the password into the log."""


def connect(url: str, answer_s: float) -> BlockingConnectionPool:
    """No connection is made yet, and no call will be sent twice.

    Raises: ValueError, in words that hold nothing of the URL: what its parser repeats may be of a password.
    """
    try:
        if not _URL.fullmatch(url):
            raise ValueError
        return BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=answer_s,
            socket_timeout=answer_s,
            socket_connect_timeout=answer_s,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[ReadOnlyError],  # of no retries: what became a replica is left, its name asked anew
        )
    except ValueError:
        raise ValueError(
            "it has the form redis://:PASSWORD@HOST:6379/0 (rediss:// with TLS, or unix:///PATH), and every"
            " / ? # @ : % of a password percent-encoded"
        ) from None
