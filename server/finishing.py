"""From pixels to files, in a pool of threads beside the steps, and to where they are kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from engines.masks import paste_known
from server.encoding import encode, encoding_of
from server.images import read_image, read_mask
from server.jobs import EncodedImage, JobFailedError, JobFailure, JobResult, Lease, Preview, Timing
from server.request import DenoiseRequest
from server.safety import Safety
from server.storage import ResultStore, ResultStoreError
from server.work import Made, Pixels, Progress

STORE_RETRY_S = 0.5
STORE_PATIENCE_S = 30.0
"""An outage is borne for so long. Then what needs the store fails at its first try: waiting, it takes the room of
what does not."""

STORE_AWAY = JobFailure(
    code="result_store_unavailable",
    message="The finished files could not be stored; send the request again.",
    retry_after_s=5.0,
)
NO_STORE = JobFailure(
    code="no_result_store", message="The worker that made this has no result store (HALFSTEP_RESULT_STORE)."
)


class Finisher:
    """Files and results name the engine that made them.

    store: for files whose addresses are asked for; safety: sees every image and preview before it is encoded.
    """

    def __init__(self, threads: int, store: ResultStore | None = None, safety: Safety | None = None) -> None:
        self._store = store
        self._safety = safety
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    async def previews(self, request: DenoiseRequest, event: Progress, engine: str) -> tuple[Preview, ...]:
        """Those that are not withheld. Raises: JobFailedError; whatever Pillow does."""
        images = [await self._pasted(request, pixels) for _, _, pixels in event.previews]
        flags = await self._flags(request, images)
        shown = [each for each in zip(event.previews, images, flags, strict=True) if not each[2]]
        return tuple(
            [
                Preview(
                    image=image, index=index, data=await self._encode(request, pixels, request.seed + image, engine)
                )
                for (image, index, _), pixels, _ in shown
            ]
        )

    async def result(self, lease: Lease, made: Made, engine: str) -> JobResult:
        """Raises: JobFailedError where its files cannot be checked or stored; whatever Pillow does."""
        request, begun = lease.job.request, time.perf_counter()
        pixels = await asyncio.gather(*(self._pasted(request, each) for each in made.pixels))
        flags = await self._flags(request, pixels)
        images = await asyncio.gather(
            *(self._image(request, engine, *each) for each in zip(pixels, request.seeds, flags, strict=True))
        )
        timing = Timing(
            queue=made.queue_ms,
            condition=made.condition_ms,
            steps=made.steps_ms,
            decode=made.decode_ms,
            encode=(time.perf_counter() - begun) * 1000,
        )
        if request.stored:
            images = await asyncio.gather(*(self._stored(lease, *each) for each in enumerate(images)))
        return JobResult(engine=engine, timing=timing, images=tuple(images))

    async def _stored(self, lease: Lease, index: int, image: EncodedImage) -> EncodedImage:
        """The image with its key in place of its bytes; a withheld one as it is."""
        if image.flagged:
            return image
        if self._store is None:
            raise JobFailedError(NO_STORE)
        outage = self._store.outages["write"]
        while True:
            try:
                key = await self._store.write(lease.job.id, lease.attempt, index, image.format, image.inline())
                return image.model_copy(update={"data": None, "key": key})
            except ResultStoreError:
                if outage.lasts_s > STORE_PATIENCE_S:
                    raise JobFailedError(STORE_AWAY) from None
                await asyncio.sleep(STORE_RETRY_S)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    async def _flags(self, request: DenoiseRequest, images: Sequence[Pixels]) -> list[bool]:
        """Which of them to withhold. Raises: JobFailedError when nobody could say."""
        if self._safety is None or not images:
            return [False] * len(images)
        return await self._safety.flags(request.model, images, request.prompt)

    async def _image(
        self, request: DenoiseRequest, engine: str, pixels: Pixels, seed: int, flagged: bool
    ) -> EncodedImage:
        data = None if flagged else await self._encode(request, pixels, seed, engine)
        return EncodedImage(seed=seed, flagged=flagged, data=data, format=request.output_format)

    async def _pasted(self, request: DenoiseRequest, pixels: Pixels) -> Pixels:
        if request.mask is None:
            return pixels
        return await asyncio.get_running_loop().run_in_executor(self._pool, with_known, request, pixels)

    async def _encode(self, request: DenoiseRequest, pixels: Pixels, seed: int, engine: str) -> bytes:
        encoding = encoding_of(request, seed, engine)
        return await asyncio.get_running_loop().run_in_executor(self._pool, encode, pixels, encoding)


def with_known(request: DenoiseRequest, pixels: Pixels) -> Pixels:
    """An inpainted image with the caller's own pixels outside the mask; any other as it is."""
    if request.image is None or request.mask is None:
        return pixels
    return paste_known(pixels, read_image(request.image), read_mask(request.mask))
