"""From pixels to files, in a pool of threads beside the steps, and to where they are kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from engines.masks import paste_known
from server.costs import Offer
from server.encoding import encode, encoding_of
from server.images import read_image, read_mask
from server.jobs import EncodedImage, JobFailedError, JobFailure, JobResult, Lease, Preview, Timing
from server.request import DenoiseRequest
from server.storage import ResultStore, ResultStoreError
from server.work import Made, Pixels, Progress

STORE_RETRY_S = 0.5
STORE_PATIENCE_S = 30.0
"""A file is tried again for so long before its job fails."""

STORE_AWAY = JobFailure(
    code="result_store_unavailable",
    message="The finished files could not be stored; send the request again.",
    retry_after_s=5.0,
)
NO_STORE = JobFailure(
    code="no_result_store", message="The worker that made this has no result store (HALFSTEP_RESULT_STORE)."
)


class Finisher:
    """offers: the models; files and results name the engine that made them.

    store: for files whose addresses are asked for.
    """

    def __init__(
        self,
        offers: Mapping[str, Offer],
        threads: int,
        store: ResultStore | None = None,
    ) -> None:
        self._engines = {name: offer.engine for name, offer in offers.items()}
        self._store = store
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    async def previews(self, request: DenoiseRequest, event: Progress) -> tuple[Preview, ...]:
        """Raises: OSError, ValueError when Pillow does."""
        files = [await self._encode(request, pixels, request.seed + image) for image, _, pixels in event.previews]
        return tuple(
            Preview(image=image, index=index, data=data)
            for (image, index, _), data in zip(event.previews, files, strict=True)
        )

    async def result(self, lease: Lease, made: Made) -> JobResult:
        """Raises: OSError, ValueError when Pillow does; JobFailedError where its files cannot be stored."""
        request, begun = lease.job.request, time.perf_counter()
        pairs = zip(made.pixels, request.seeds, strict=True)
        files = await asyncio.gather(*(self._encode(request, pixels, seed) for pixels, seed in pairs))
        timing = Timing(
            queue=made.queue_ms,
            condition=made.condition_ms,
            steps=made.steps_ms,
            decode=made.decode_ms,
            encode=(time.perf_counter() - begun) * 1000,
        )
        images = [
            EncodedImage(seed=seed, data=data, format=request.output_format)
            for seed, data in zip(request.seeds, files, strict=True)
        ]
        if request.stored:
            images = await asyncio.gather(*(self._stored(lease, *each) for each in enumerate(images)))
        return JobResult(engine=self._engines[request.model], timing=timing, images=tuple(images))

    async def _stored(self, lease: Lease, index: int, image: EncodedImage) -> EncodedImage:
        """The image with its key in place of its bytes."""
        if self._store is None:
            raise JobFailedError(NO_STORE)
        give_up_s = time.monotonic() + STORE_PATIENCE_S
        while True:
            try:
                key = await self._store.write(lease.job.id, lease.attempt, index, image.format, image.inline())
                return image.model_copy(update={"data": None, "key": key})
            except ResultStoreError:
                if time.monotonic() > give_up_s:
                    raise JobFailedError(STORE_AWAY) from None
                await asyncio.sleep(STORE_RETRY_S)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    async def _encode(self, request: DenoiseRequest, pixels: Pixels, seed: int) -> bytes:
        encoding = encoding_of(request, seed, self._engines[request.model])

        def work() -> bytes:
            return encode(with_known(request, pixels), encoding)

        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def with_known(request: DenoiseRequest, pixels: Pixels) -> Pixels:
    """An inpainted image with the caller's own pixels outside the mask; any other as it is."""
    if request.image is None or request.mask is None:
        return pixels
    return paste_known(pixels, read_image(request.image), read_mask(request.mask))
