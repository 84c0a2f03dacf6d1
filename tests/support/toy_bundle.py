"""A tiny but complete bundle, built in milliseconds without torch: digits in all but the weights.

Its step graphs hold the exact inputs, outputs and update of the real ones around a network of two small
convolutions that depends on the class, w and the timestep.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from engines.bundle import Bundle, file_records, write_bundle
from engines.condition import LabelClass, LabelVocabulary
from engines.manifest import (
    CONDITION_GRAPH,
    DECODE_GRAPH,
    ENCODE_GRAPH,
    BundleManifest,
    ConditionSpec,
    Evaluation,
    EvaluationRow,
    GraphSpec,
    GuidanceRange,
    Latent,
    Licences,
    Measured,
    Parity,
    RecipeRecord,
    Size,
    StudentSpec,
)
from engines.sampler import Sampler, encoder_plan, sampler_plan
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support.toy_graphs import SCALE, WIDTH, condition_graph, decode_graph, encode_graph, step_graph

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class ToyOptions:
    """What a test may want different.

    channels, depth: size of the network (96 and 24 make a step of some 10 ms); nan_class: a class whose
    output is NaN, for fault tests; stochastic: step counts that also get a stochastic student; shared: one
    step graph for every N, with the grid input; encoders: step counts of encoders; seeing: networks
    that see the mask; weights_seed: another model of the same shapes; sizes: (width, height) of images, multiples
    of 8, which graphs leave free where there are several.
    """

    name: str = "toy-digits"
    steps: tuple[int, ...] = (1, 2, 4, 8)
    stochastic: tuple[int, ...] = ()
    default_steps: int = 4
    clip: float | None = None
    channels: int = 8
    depth: int = 1
    nan_class: int | None = None
    shared: bool = False
    encoders: tuple[int, ...] = ()
    seeing: bool = False
    weights_seed: int = 0
    sizes: tuple[tuple[int, int], ...] = ((64, 64),)


def make_toy_bundle(destination: Path, options: ToyOptions | None = None) -> Bundle:
    """Write a toy bundle at ``destination``, which verifies."""
    chosen = options or ToyOptions()
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".toy-", dir=destination.parent))
    graphs = _write_graphs(staging, chosen)
    (staging / "tokenizer.json").write_text(_vocabulary().model_dump_json(indent=1), encoding="utf-8")
    return write_bundle(staging, destination, _manifest(staging, chosen, graphs))


def _vocabulary() -> LabelVocabulary:
    classes = tuple(LabelClass(name=name, aliases=(str(i),)) for i, name in enumerate(DIGITS))
    return LabelVocabulary(classes=classes, templates=("{}", "a {}", "the digit {}", "a handwritten {}"))


def _write_graphs(folder: Path, options: ToyOptions) -> dict[str, GraphSpec]:
    students = [("step", 0)] if options.shared else [(f"step_{n}", n) for n in options.steps]
    students += [(f"invert_{n}", 100 + n) for n in options.encoders]
    free = len(options.sizes) > 1
    around = {DECODE_GRAPH: decode_graph(free=free), ENCODE_GRAPH: encode_graph(free=free)}
    models = {CONDITION_GRAPH: condition_graph(), **around}
    for name, n in students:
        models[name] = step_graph(
            seed=1000 * options.weights_seed + n,
            channels=options.channels,
            depth=options.depth,
            nan_class=options.nan_class,
            grid=options.shared and name == "step",
            seeing=options.seeing,
            free=free,
        )
    parity = Parity(reference="built in ONNX, not exported", max_abs_error=0.0, mean_abs_error=0.0, rows=0)
    specs = {}
    for name, graph in models.items():
        (folder / f"{name}.onnx").write_bytes(graph.serialised)
        specs[name] = GraphSpec(file=f"{name}.onnx", inputs=graph.inputs, outputs=graph.outputs, parity=parity)
    return specs


def _students(options: ToyOptions, schedule: NoiseSchedule) -> tuple[StudentSpec, ...]:
    kinds: list[tuple[int, Sampler]] = [(n, "deterministic") for n in options.steps]
    kinds += [(n, "stochastic") for n in options.stochastic]
    return tuple(
        StudentSpec(
            steps=n,
            sampler=sampler,
            graph="step" if options.shared else f"step_{n}",
            timesteps=sampler_plan(schedule, n, sampler, "v_prediction", options.clip).timesteps,
            grid=float(n) if options.shared else None,
        )
        for n, sampler in kinds
    )


def _encoders(options: ToyOptions, schedule: NoiseSchedule) -> tuple[StudentSpec, ...]:
    plans = {n: encoder_plan(schedule, n) for n in options.encoders}
    return tuple(StudentSpec(steps=n, graph=f"invert_{n}", timesteps=p.timesteps) for n, p in plans.items())


def _manifest(folder: Path, options: ToyOptions, graphs: dict[str, GraphSpec]) -> BundleManifest:
    schedule = ScheduleSpec()
    distance = {"frechet_distance": Measured(mean=1.0, spread=0.1)}
    evaluation = [
        EvaluationRow(model="teacher", steps=64, evaluations=128, guidance_scale=2.0, metrics=distance),
        *(
            EvaluationRow(model="student", steps=n, evaluations=n, guidance_scale=2.0, metrics=distance)
            for n in options.steps
        ),
    ]
    return BundleManifest(
        name=options.name,
        description="A toy with the shapes of digits",
        created=0,
        tasks=("text_to_image", "edit", "inpaint"),
        prediction_type="v_prediction",
        schedule=schedule,
        clip=options.clip,
        guidance=GuidanceRange(min=1.0, max=5.0, default=2.0),
        latent=Latent(channels=1),
        sizes=tuple(
            Size(width=width, height=height, latent_width=width // SCALE, latent_height=height // SCALE)
            for width, height in options.sizes
        ),
        condition=ConditionSpec(kind="labels", tokenizer="tokenizer.json", tokens=1, width=WIDTH),
        graphs=graphs,
        students=_students(options, NoiseSchedule(schedule)),
        encoders=_encoders(options, NoiseSchedule(schedule)),
        default_steps=options.default_steps,
        evaluation=Evaluation(metric="none", samples=0, seeds=(0,), rows=tuple(evaluation)),
        recipe=RecipeRecord(name="toy", sha256="0" * 64, text=""),
        licences=Licences(teacher="none", data="none"),
        files=file_records(folder),
    )
