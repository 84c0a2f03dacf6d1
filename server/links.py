"""Addresses of stored files, which need no API key and end when the file does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import ApiError, NotFoundError
from server.signing import Signer
from server.storage import FileGoneError, ResultStore, expires_at, is_key

_EXPIRES = re.compile(r"[0-9]{1,12}", re.ASCII)


@dataclass(frozen=True)
class Link:
    """expires_at: seconds since 1970."""

    url: str
    expires_at: int


class FileLinks:
    """A bucket signs addresses of its own; the files of a folder are served by every API of the same secret.

    clock: seconds since 1970.
    """

    def __init__(self, files: ResultStore, signer: Signer, clock: Callable[[], float] = time.time) -> None:
        self._files = files
        self._signer = signer
        self._clock = clock

    async def link(self, key: str, base_url: str) -> Link:
        """base_url: of the API. Raises: ResultStoreError."""
        expires = expires_at(key)
        if self._files.signs:
            return Link(await self._files.address(key), expires)
        signature = self._signer.sign_file(key, expires)
        return Link(f"{base_url}/files/{key}?expires={expires}&signature={signature}", expires)

    async def open(self, key: str, expires: str, signature: str) -> bytes:
        """The file at an address made by ``link``.

        Raises: ApiError 403 where the address was not made here or its time is over; NotFoundError;
        ResultStoreError.
        """
        known = is_key(key) and _EXPIRES.fullmatch(expires) is not None
        if not known or not self._signer.signed_file(key, int(expires), signature):
            raise ApiError(403, "invalid_signature", "This address was not made here, or was changed since.")
        if self._clock() > int(expires):
            raise ApiError(403, "url_expired", "The time of this address is over; ask for its job again.")
        try:
            return await self._files.read(key)
        except FileGoneError:
            raise NotFoundError("file_not_found", "This file is gone.") from None
