"""What the store raises when Redis does not do its part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from server.stores.base import StoreUnavailableError


@contextmanager
def translated() -> Iterator[None]:
    """Raises: StoreUnavailableError for whatever goes wrong with Redis."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise StoreUnavailableError(f"the job store does not answer: {error}") from error
