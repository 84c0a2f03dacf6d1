"""Which engine a worker uses: one that needs no build at first, the preferred one once it is built, new versions.

Serving never waits. The preferred engine is built at low priority, loaded beside the one in use, and taken up when
it makes the same images. When it fails later, and fails that check as well, serving goes back to the first. New
versions of the bundles begin at the first engine again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Literal, Protocol

import structlog

from engines.backends.load import BUILT, OFFERED, ON_GPU, choose_backend, choose_precision
from engines.errors import BackendError, HalfstepError
from server.engine import Engine, Report
from server.engine_build import build
from server.engine_process import EngineProcess
from server.engine_switch import EngineSwitch
from server.loading import usable_cache
from server.metrics import Metrics
from server.parity import Sample, check_like, probe_requests
from server.request import DenoiseRequest
from server.settings import Settings
from server.versions import Version, hashes, new_versions

RETRY_S = 5.0
"""Between tries to go back to the first engine, and to have it make the samples."""

SAMPLE_TRIES = 3

_log = structlog.get_logger()


class Spawned(Engine, Protocol):
    """An engine that is loaded before it is listened to."""

    def spawn(self) -> None:
        """Raises: BackendError."""
        ...


Make = Callable[[Settings, Mapping[str, str]], Spawned]
"""Settings and the versions of the bundles → an engine that loads exactly them."""

Build = Callable[[Settings], Awaitable[None]]


def start_settings(settings: Settings, versions: Sequence[Version]) -> Settings:
    """Of the engine that a worker starts on.

    Raises: BackendError where the preferred backend does not offer the precision.
    """
    choose_precision(choose_backend(settings.backend), settings.precision)
    start = settings.start_backend
    return _with(settings if start is None else _settings_on(settings, start), versions)


def make_engine(settings: Settings, versions: Mapping[str, str]) -> Spawned:
    return EngineProcess(settings, versions=versions)


class Succession(EngineSwitch):
    """The engine of a worker, changed under way.

    first: on ``start_settings``; versions: what it serves; make, build: for tests.
    """

    def __init__(
        self,
        first: Engine,
        settings: Settings,
        versions: Sequence[Version],
        metrics: Metrics,
        make: Make = make_engine,
        build: Build = build,
    ) -> None:
        super().__init__(first)
        self._settings = settings
        self._versions = tuple(versions)
        self._metrics = metrics
        self._make = make
        self._build = build
        self._preferred = not _differ(settings)
        self._samples: list[Sample] = []
        self._lost = ""
        """Why the engine in use is ended already, while there is none to go back to yet."""
        self._changing = asyncio.Lock()
        self._improving: asyncio.Task[None] | None = None
        self._rechecking: asyncio.Task[None] | None = None

    @property
    def versions(self) -> tuple[Version, ...]:
        """What is served now."""
        return self._versions

    def start(self, report: Report) -> None:
        super().start(report)
        self._note()
        self._improve_beside()

    async def close(self) -> bool:
        await _end(self._improving)
        await _end(self._rechecking)
        return await super().close()

    async def renew(self) -> tuple[Version, ...]:
        """Take up what lies where the settings say now, if that is new, and try again what was refused before.

        Returns: what is served from then on. Raises: HalfstepError when it is refused; the old goes on then.
        """
        versions = await asyncio.to_thread(new_versions, self._settings, self._versions)
        if hashes(versions) == hashes(self._versions):
            _log.info("bundles_unchanged")
            if self._improving is not None and self._improving.done():
                self._improve_beside()
            return self._versions
        await _end(self._improving)
        await _end(self._rechecking)
        try:
            await self._take_up_versions(versions)
            return self._versions
        finally:
            self._improve_beside()
            if self._doubted:
                self._recheck_beside()

    def _improve_beside(self) -> None:
        self._improving = asyncio.create_task(self._improve(), name="improve")

    def _recheck_beside(self) -> None:
        self._rechecking = asyncio.create_task(self._recheck(), name="recheck")

    async def _improve(self) -> None:
        """Build the preferred engine, and take it up if it makes what the one in use makes."""
        if self._preferred:
            return
        settings = _with(_settings_on(self._settings, self._settings.backend), self._versions)
        try:
            await self._build(settings)
            async with self._changing:
                samples = [*await self._made_here(), *self.recent]
                async with self._beside(settings, self._versions) as engine:
                    await self._check(engine, samples)
                    self._samples, self._preferred = samples, True
                    self.take_up(engine, self._doubted_for)
            self._note("engine", "taken_up")
        except Exception as error:  # nobody awaits this task, and serving goes on
            unexpected = not isinstance(error, HalfstepError)
            _log.error("engine_refused", backend=settings.backend, reason=str(error), exc_info=unexpected)
            self._metrics.takeovers.labels("engine", "refused").inc()

    async def _take_up_versions(self, versions: tuple[Version, ...]) -> None:
        settings = start_settings(self._settings, versions)
        if choose_backend(settings.backend) in BUILT and usable_cache(settings.cache_dir) is not None:
            await self._build(settings)  # else it is made at the start, as everything is without a cache
        async with self._changing, self._beside(settings, versions) as engine:
            await self.ask(engine, _probes(versions))
            self._versions, self._preferred, self._lost = versions, not _differ(self._settings), ""
            self.take_up(engine, None)
        self._note("bundle", "taken_up")

    async def _made_here(self) -> list[Sample]:
        """What the engine in use makes of the probes; a job beside them may take it down once or twice."""
        requests = _probes(self._versions)
        for attempt in range(1, SAMPLE_TRIES + 1):
            try:
                made = await self.ask(self._current, requests)
                return [Sample(request, pixels) for request, pixels in zip(requests, made, strict=True)]
            except BackendError:
                if attempt == SAMPLE_TRIES:
                    raise
                await asyncio.sleep(RETRY_S)
        raise AssertionError("unreachable")

    async def _check(self, engine: Engine, samples: Sequence[Sample]) -> None:
        """Raises: BackendError when the engine fails on a sample, or makes something else of it."""
        precision = choose_precision(choose_backend(self._settings.backend), self._settings.precision)
        manifests = [version.bundle.manifest for version in self._versions]
        in_int8 = {manifest.name for manifest in manifests if manifest.in_int8}
        made = await self.ask(engine, [sample.request for sample in samples])
        for sample, pixels in zip(samples, made, strict=True):
            check_like(sample, pixels, "int8" if sample.request.model in in_int8 else precision)

    def _doubted_for(self, reason: str) -> None:
        _log.warning("engine_doubted", reason=reason)
        self._recheck_beside()

    async def _recheck(self) -> None:
        """Whether the engine in use can still do what it could, or a job alone is to blame."""
        async with self._changing:
            if not self._doubted:
                return
            try:
                if not self._lost:
                    await self._check(self._current, self._samples)
                    _log.info("engine_trusted")
                    self.trust()
                    return
            except Exception as error:  # nobody awaits this task, and jobs wait for its verdict
                _log.error("engine_given_up", backend=self._settings.backend, reason=str(error))
                self._lost = str(error)
            await self._go_back()

    async def _go_back(self) -> None:
        """To the first engine; the jobs of the failed one start anew there. There is nothing else left to try."""
        self._preferred = False
        while True:
            try:
                await self._current.close()  # first, for the memory it has
                async with self._beside(start_settings(self._settings, self._versions), self._versions) as engine:
                    self.take_up(engine, None, give_up=True)
            except Exception as error:  # nobody awaits this task, and jobs wait for an engine
                unexpected = not isinstance(error, HalfstepError)
                _log.error(
                    "engine_not_started",
                    backend=self._settings.start_backend,
                    reason=str(error),
                    exc_info=unexpected,
                )
                self.hand_back(str(error))
                await asyncio.sleep(RETRY_S)
            else:
                self._lost = ""
                self._note("engine", "given_up")
                return

    @asynccontextmanager
    async def _beside(self, settings: Settings, versions: Sequence[Version]) -> AsyncIterator[Spawned]:
        """An engine loaded beside the one in use, and closed afterwards unless it was taken up."""
        engine = self._make(settings, hashes(versions))
        try:
            await asyncio.to_thread(engine.spawn)
            self.listen_to(engine)
            yield engine
        finally:
            if not self.uses(engine):
                self.discard(engine)

    def _note(self, what: Literal["engine", "bundle"] | None = None, outcome: str = "") -> None:
        engines = {name: offer.engine for name, offer in self.offers.items()}
        self._metrics.uses(engines, preferred=self._preferred)
        self._metrics.serves(hashes(self._versions))
        if what is not None:
            self._metrics.takeovers.labels(what, outcome).inc()
            _log.info("engine_in_use", **engines)


def _settings_on(settings: Settings, backend: str) -> Settings:
    """The settings of an engine on a backend, which may lack what the other one has."""
    chosen = choose_backend(backend)
    update: dict[str, object] = {"backend": backend}
    if settings.precision not in OFFERED[chosen]:
        update["precision"] = "auto"
    if chosen in ON_GPU:
        update["threads"] = 0
    return settings.model_copy(update=update)


def _with(settings: Settings, versions: Sequence[Version]) -> Settings:
    return settings.model_copy(update={"bundles": tuple(version.bundle.path for version in versions)})


def _differ(settings: Settings) -> bool:
    """Whether the preferred engine is another than the first."""
    start = settings.start_backend
    return start is not None and choose_backend(settings.backend) != start


def _probes(versions: Sequence[Version]) -> list[DenoiseRequest]:
    return [
        request
        for version in versions
        for request in probe_requests(version.bundle.manifest, version.tokenizer.known())
    ]


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait([task])
