"""The one thread that runs engines: join → condition → step → decode, for as long as there is work.

It owns the batcher and all rows. The event loop speaks to it through an inbox and hears back through
``report``, so a step never waits for HTTP, nor HTTP for a step.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from queue import Empty, SimpleQueue

from engines.pipeline import Pipeline
from server.batching import Batch, Batcher
from server.costs import Offer, best_rung
from server.engine import Report
from server.jobs import Lease
from server.request import find_size
from server.stages import Conditions, decode_latents, encode_images, failure_of, step_rows
from server.work import Crashed, Dropped, Event, Failed, Image, Late, Pixels, Progress, Started, Stepped, Work

_CLOSE = object()
CLOSE_S = 2.0


class EngineThread:
    """pipelines: by model name."""

    def __init__(self, pipelines: Mapping[str, Pipeline]) -> None:
        self._pipelines = pipelines
        self._offers = {name: Offer.of(pipeline) for name, pipeline in pipelines.items()}
        self._report: Report = lambda events: None
        self._conditions = {name: Conditions(pipeline) for name, pipeline in pipelines.items()}
        self._batcher: Batcher[Image] = Batcher(self._choose_rung)
        self._inbox: SimpleQueue[Work | str | object] = SimpleQueue()
        self._newcomers: list[Work] = []
        self._works: dict[str, Work] = {}
        self._events: list[Event] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def offers(self) -> dict[str, Offer]:
        return self._offers

    def start(self, report: Report) -> None:
        """report: called on this thread with the events of one step."""
        self._report = report
        self._thread.start()

    @property
    def up(self) -> bool:
        return True

    @property
    def pid(self) -> int:
        return os.getpid()

    async def ready(self) -> None:
        """A thread takes jobs at once."""

    def join_job(self, lease: Lease) -> None:
        """Take a job in at the next step. From any thread."""
        self._inbox.put(Work(lease, lease.claimed_s))

    def stop_job(self, token: str) -> None:
        """Drop a lease's rows at the next step; no event follows. From any thread."""
        self._inbox.put(token)

    async def close(self) -> bool:
        """End the thread after the step it is in; unfinished jobs are dropped. False: that step did not return."""
        self._inbox.put(_CLOSE)
        await asyncio.to_thread(self._thread.join, CLOSE_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._receive():
                self._turn()
        except Exception as error:  # a dead thread must not leave its callers waiting
            self._report([Crashed(error)])
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Of the models, when another engine takes this one's place.

        Its batcher makes a cycle of it, and of what was loaded at the start the collector frees nothing.
        """
        self._pipelines, self._conditions = {}, {}

    def _turn(self) -> None:
        """One step, whoever it is for, and what it brought about."""
        self._drop_late()
        newcomers, self._newcomers = self._newcomers, []
        for model in dict.fromkeys(work.request.model for work in newcomers):
            self._start(model, [work for work in newcomers if work.request.model == model])
        batch = self._batcher.next()
        if batch is not None:
            self._step(batch)
        events, self._events = self._events, []
        if events:
            self._report(events)

    def _receive(self) -> bool:
        """Empty the inbox, waiting for a message when there is nothing to step; False to end."""
        block = len(self._batcher) == 0
        while True:
            try:
                message = self._inbox.get(block=block)
            except Empty:
                return True
            if message is _CLOSE:
                return False
            if isinstance(message, Work):
                self._newcomers.append(message)
            elif isinstance(message, str):
                self._drop(message)
            block = False

    def _drop(self, token: str) -> None:
        self._newcomers = [work for work in self._newcomers if work.token != token]
        work = self._works.pop(token, None)
        if work is None:
            return
        self._batcher.remove(work.tickets)
        left = sum(ticket.steps_left for ticket in work.tickets)
        self._events.append(Dropped(work.request.model, left))

    def _drop_late(self) -> None:
        """No step is run for a job whose deadline has passed."""
        now = time.perf_counter()
        for work in [*self._newcomers, *self._works.values()]:
            if work.deadline_s is not None and work.deadline_s <= now:
                self._drop(work.token)
                self._events.append(Late(work.token, work.spans))

    def _start(self, model: str, works: list[Work]) -> None:
        begun = time.perf_counter()
        conditions = self._conditions[model].get([prompt for work in works for prompt in work.request.prompts])
        images = encode_images(self._pipelines[model], works)
        ended = time.perf_counter()
        for work in works:
            self._works[work.token] = work
            work.started_s, work.condition_ms = begun, (ended - begun) * 1000
            work.ran("condition", begun, ended)
            self._events.append(Started(work.token, work.queue_ms, self._offers[model].engine))
            try:
                work.start_rows(self._pipelines[model], conditions, images.get(work.token))
            except Exception as error:  # one bad job, whatever an engine raised for it, is no end of the thread
                self._fail(work, error, "condition")
                continue
            for ticket in work.tickets:
                self._batcher.add(ticket)

    def _step(self, batch: Batch[Image]) -> None:
        images = [ticket.row for ticket in batch.tickets]
        model = images[0].work.request.model
        pipeline = self._pipelines[model]
        begun = time.perf_counter()
        outcomes = step_rows(pipeline, [image.row for image in images])
        ended = time.perf_counter()
        for ticket in batch.tickets:
            ticket.key = ticket.row.key
        done = self._batcher.stepped(batch)
        size = str(find_size(pipeline.manifest, images[0].work.request))
        self._events.append(Stepped(model, size, batch.rung, len(batch.tickets), ended - begun))
        for work in dict.fromkeys(image.work for image in images):
            work.steps_ms += (ended - begun) * 1000
            work.ran("steps", begun, ended)
        for image, error in zip(images, outcomes, strict=True):
            if error is not None:
                self._fail(image.work, error, "steps")
        self._decode(pipeline, images, {id(ticket.row) for ticket in done})

    def _decode(self, pipeline: Pipeline, images: list[Image], done: set[int]) -> None:
        """Decode what the step finished and the previews it was asked for, then report every job of it."""
        alive = [image for image in images if image.work.token in self._works]
        wanted = [i for i in alive if id(i) in done or i.preview_due]
        previews: dict[Work, list[tuple[int, int, Pixels]]] = {image.work: [] for image in alive}
        begun = time.perf_counter()
        latents = [image.row.latent if id(image) in done else image.row.clean for image in wanted]
        decoded = decode_latents(pipeline, latents) if wanted else []
        ended = time.perf_counter()
        for work in dict.fromkeys(image.work for image in wanted):
            work.decode_ms += (ended - begun) * 1000
            work.ran("decode", begun, ended)
        for image, pixels in zip(wanted, decoded, strict=True):
            if isinstance(pixels, Exception):
                self._fail(image.work, pixels, "decode")
            elif id(image) in done:
                image.work.pixels[image.index] = pixels
            else:
                index = image.work.preview_at.index(image.row.position)
                previews[image.work].append((image.index, index, pixels))
        for work, taken in previews.items():
            self._settle(work, tuple(taken))

    def _settle(self, work: Work, previews: tuple[tuple[int, int, Pixels], ...]) -> None:
        if work.token not in self._works:  # failed in this very step
            return
        if work.complete:
            del self._works[work.token]
            self._events.append(work.made())
        else:
            self._events.append(Progress(work.token, work.step, previews))

    def _fail(self, work: Work, error: Exception, stage: str) -> None:
        """Fail a job once, however many of its rows are bad."""
        if self._works.pop(work.token, None) is None:
            return
        self._batcher.remove(work.tickets)
        self._events.append(Failed(work.token, failure_of(error), stage, work.spans))

    def _choose_rung(self, image: Image, waiting: int) -> int:
        pipeline = self._pipelines[image.work.request.model]
        return best_rung(pipeline, str(pipeline.next_call(image.row)), waiting)
