"""A bundle whose step graphs compute in int8, from one in float32: calibrated on what its own students draw."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from engines.backends.openvino import OpenVinoBackend
from engines.bundle import INLINE_LIMIT_BYTES, Bundle, check_replaceable, file_records, write_bundle
from engines.calibration import BATCH, Recorded, record_trajectories
from engines.errors import BundleError
from engines.int8_graph import check_installed, quantize_graph
from engines.manifest import LATENT, NAME_PATTERN, BundleManifest, Evaluation, GraphSpec, Parity
from engines.measure import Progress

HELD_OUT = 8
"""One trajectory in this many of each student and size is kept from calibration: on all steps of these the int8
graph's parity is measured."""

NOT_EVALUATED = "none: not evaluated in int8"


@dataclass(frozen=True)
class Int8Options:
    """batches: of 8 images that each student draws, for the ranges of its activations; at least 2 of each size.
    seed: of their noise and guidance. name: of the new bundle; empty for the old one's with ``-int8``.
    """

    batches: int = 16
    seed: int = 0
    name: str = ""


def quantize_bundle(
    bundle: Bundle, destination: Path, options: Int8Options | None = None, progress: Progress | None = None
) -> Bundle:
    """Write ``bundle`` with the step graphs of its students in int8, replacing a bundle at ``destination``.

    All else stays as it is: condition, decode, encode, and encoders that invert. The evaluation and the tables are
    left empty: they were of other graphs.
    Raises: BundleError when a step graph is not float32, or no bundle may have the name; BackendError when NNCF is
    missing.
    """
    chosen = options or Int8Options()
    check_replaceable(destination)
    check_installed()
    _check_graphs(bundle)
    name = chosen.name or f"{bundle.manifest.name}-int8"
    if not re.match(NAME_PATTERN, name):
        raise BundleError(f"{name!r} is no name of a bundle: 1 to 64 of a-z, 0-9, '.', '_' and '-'")
    recorded = record_trajectories(bundle, chosen.batches, chosen.seed, progress)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".int8-", dir=destination.parent))
    try:
        graphs = dict(bundle.manifest.graphs)
        steps = [graphs[graph].file for graph in recorded]
        made_anew = {name for file in steps for name in (file, *bundle.data_files[file])}
        for file in bundle.manifest.files:
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            if file not in made_anew:
                shutil.copyfile(bundle.file(file), staging / file)
        for graph, calls in recorded.items():
            if progress is not None:
                progress(graph, len(calls.inputs) * BATCH)
            graphs[graph] = _quantize(bundle.graph_file(graph), staging, graphs[graph], calls)
        return write_bundle(staging, destination, _manifest(bundle.manifest, staging, graphs, name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _manifest(was: BundleManifest, staging: Path, graphs: dict[str, GraphSpec], name: str) -> BundleManifest:
    changed = {
        "name": name,
        "description": f"{was.description}; steps in int8".removeprefix("; "),
        "graphs": graphs,
        "files": file_records(staging),
        "evaluation": Evaluation(metric=NOT_EVALUATED, samples=0, seeds=(), rows=()),
        "tables": {},
    }
    return BundleManifest.model_validate({**was.model_dump(), **changed})


def _check_graphs(bundle: Bundle) -> None:
    for student in bundle.manifest.students:
        spec = bundle.manifest.graphs[student.graph]
        if spec.dtype != "float32":
            raise BundleError(f"{bundle.path}: {spec.file} is {spec.dtype}; int8 is made from float32")


def _quantize(file: Path, staging: Path, spec: GraphSpec, calls: Recorded) -> GraphSpec:
    """Write the int8 graph into ``staging``, and measure it on the calls held out."""
    held_out = _held_out(calls)
    seen = [rows for i, rows in enumerate(calls.inputs) if i not in held_out]
    target = staging / spec.file
    _save(quantize_graph(onnx.load(file, load_external_data=False), seen, file.parent), target)
    lowered = spec.model_copy(update={"dtype": "int8", "parity_by_size": {}, "lowered": {}, "rounded": None})
    engine = OpenVinoBackend(target, lowered)
    errors = []
    for i in held_out:
        got = engine.run(calls.inputs[i])
        errors += [np.abs(got[name].astype(np.float64) - want) for name, want in calls.outputs[i].items()]
    engine.close()
    parity = Parity(
        reference="the float32 graph",
        max_abs_error=max(float(error.max()) for error in errors),
        mean_abs_error=float(np.mean([error.mean() for error in errors])),
        rows=len(held_out) * BATCH,
    )
    return lowered.model_copy(update={"parity": parity})


def _save(model: onnx.ModelProto, file: Path) -> None:
    beside = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > INLINE_LIMIT_BYTES
    onnx.save_model(model, str(file), save_as_external_data=beside, location=f"{file.name}.data")


def _held_out(calls: Recorded) -> list[int]:
    """Numbers of the calls that measure the int8 graph."""
    drawn: dict[tuple[int, tuple[int, ...]], list[tuple[int, int]]] = {}
    for (steps, number), rows in zip(calls.batches, calls.inputs, strict=True):
        drawn.setdefault((steps, rows[LATENT].shape), []).append((steps, number))
    kept = {batch for batches in drawn.values() for batch in list(dict.fromkeys(batches))[::HELD_OUT]}
    return [i for i, batch in enumerate(calls.batches) if batch in kept]
