"""From a question and the settings of a server to the plan that answers it."""

from __future__ import annotations

from collections.abc import Callable

from server.capacity.plan import Forecast, Load, Planner, admission_of
from server.capacity.question import Question
from server.capacity.report import Plan, PlannedModel
from server.capacity.sources import costed, file_ms
from server.capacity.traffic import kinds
from server.capacity.worker import WorkerLimits
from server.settings import Settings


def answer(
    question: Question, settings: Settings, command: str, told: Callable[[Forecast], None] = lambda _: None
) -> Plan:
    """command: that asked; told: of each forecast. Raises: PlanError, RequestError, BundleError, BackendError."""
    models, mix = costed(settings, question.cost_files), question.mix
    asked = kinds([(model.bundle.manifest, model.costs) for model in models], mix)
    writing_ms = file_ms(asked) if question.file_ms is None else question.file_ms
    load = Load(asked, question.rate, question.requests, mix.new_prompts, question.seed)
    planner = Planner(
        load,
        question.p99_s,
        WorkerLimits(settings.max_rows, settings.encode_threads, writing_ms / 1000),
        admission_of(
            [(model.bundle, model.costs) for model in models],
            asked,
            settings.max_queue_s,
            settings.max_queued_rows,
        ),
    )
    forecasts = [planner.forecast(question.workers)] if question.workers else planner.search(told)
    return Plan(
        command=command,
        models={
            m.bundle.manifest.name: PlannedModel(engine=m.engine, costs=m.source, rungs=m.costs.rungs)
            for m in models
        },
        rate=question.rate,
        images_per_s=load.images_per_s,
        p99_s=question.p99_s,
        requests=question.requests,
        seed=question.seed,
        tasks={str(task): share for task, share in mix.tasks.items()},
        steps=None if mix.steps is None else {str(steps): share for steps, share in mix.steps.items()},
        sizes=None if mix.sizes is None else dict(mix.sizes),
        images={str(n): share for n, share in mix.images.items()},
        strength=mix.strength,
        new_prompts=mix.new_prompts,
        file_ms=writing_ms,
        max_rows=settings.max_rows,
        max_queue_s=settings.max_queue_s,
        max_queued_rows=settings.max_queued_rows,
        encode_threads=settings.encode_threads,
        least_workers=load.least_workers,
        workers=next((made.workers for made in forecasts if made.kept), None),
        forecasts=tuple(forecasts),
    )
