"""What is done with the folder, each in a process of its own; the last line of each is one JSON object."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.base import Precision
from engines.bundle import Bundle, verify_bundle
from engines.manifest import ENCODE_GRAPH
from engines.noise import Purpose, row_noise
from engines.open import load_pipeline
from tests.true_size import BUNDLE, PHOTOS, STUDENT, TEACHER

PROMPT, GUIDANCE_SCALE, SEED, STEPS = "a cat and a dog", 4.0, 1, 2
REFERENCE = "reference.npz"

Arrays = dict[str, NDArray[Any]]


def make(work: Path, model: str) -> dict[str, Any]:
    """The folders of teacher and student, and some photographs to train on."""
    from tests.true_size.making import make_student, make_teacher
    from tests.true_size.training import make_photos

    parameters = make_teacher(model, work / TEACHER)
    make_student(work / TEACHER, work / STUDENT)
    make_photos(work / PHOTOS)
    return {"parameters": parameters}


def diffusers(work: Path, model: str) -> dict[str, Any]:
    """An image of the student by diffusers' own pipeline, and what passes between its parts, kept in a file."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        work / STUDENT, use_safetensors=True, local_files_only=True, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.unet.config.sample_size
    kept: Arrays = {}

    def keep(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        kept[f"latent after step {step + 1}"] = values["latents"].numpy().copy()
        return values

    noise = row_noise(SEED, (4, size, size), Purpose.INITIAL)[None]
    with torch.inference_mode():
        kept["condition"] = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0].numpy()
        started = time.perf_counter(), time.process_time()
        drawn = pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            latents=torch.from_numpy(noise),
            output_type="np",
            callback_on_step_end=keep,
        ).images
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        kept["image"] = (drawn * 255).round().astype(np.uint8)
        pixels = torch.from_numpy(kept["image"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        encoded = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        kept["encoded"] = encoded.numpy()
    np.savez(work / REFERENCE, **kept)  # type: ignore[arg-type]
    return {
        "image_s": seconds[0],
        "image_cpu_s": seconds[1],
        "deviation": {name: float(array.std()) for name, array in kept.items()},
    }


def openvino(work: Path, model: str, precision: Precision) -> dict[str, Any]:
    """The same image by ``engines.pipeline``, and how far each part is from diffusers'."""
    pipeline = load_pipeline(
        verify_bundle(work / BUNDLE), "openvino", precision=precision, threads=0, cache_dir=None, rungs=(1,)
    )
    with np.load(work / REFERENCE) as file:
        expected = {name: file[name] for name in file.files}
    got: Arrays = {}
    seconds: dict[str, float] = {}
    started, cpu = time.perf_counter(), time.process_time()

    def lap(part: str) -> None:
        nonlocal started
        seconds[part], started = time.perf_counter() - started, time.perf_counter()

    got["condition"] = pipeline.condition([PROMPT])
    lap("condition")
    row = pipeline.start(got["condition"][0], GUIDANCE_SCALE, SEED, pipeline.student(STEPS))
    while not row.done:
        pipeline.step([row])
        got[f"latent after step {row.position}"] = row.latent[None]
        lap(f"step {row.position}")
    got["image"] = pipeline.decode([row.latent])
    lap("decode")
    image_s, image_cpu_s = sum(seconds.values()), time.process_time() - cpu
    got["encoded"] = pipeline.encode([expected["image"][0]])
    lap(ENCODE_GRAPH)
    pipeline.close()
    errors = {name: _error(got[name], expected[name]) for name in expected}
    return {
        "engine": pipeline.engine_name,
        "image_s": image_s,
        "image_cpu_s": image_cpu_s,
        "first_call_s": seconds,
        "errors": errors,
    }


def tensorrt(work: Path, model: str, precision: Precision) -> dict[str, Any]:
    """Every graph parsed, held against the manifest and compiled for a batch of 1, without a GPU."""
    from engines.backends.tensorrt_build import find_library, library_name

    library = find_library()
    bundle = verify_bundle(work / BUNDLE)
    graphs = {graph: _compile(library, bundle, graph, precision) for graph in bundle.manifest.graphs}
    return {"library": library_name(library), "graphs": graphs}


def _compile(library: Any, bundle: Bundle, graph: str, precision: Precision) -> dict[str, float]:
    from engines.backends.tensorrt_build import Network

    started = time.perf_counter()
    network = Network(library, bundle.graph_file(graph), bundle.manifest.graphs[graph], precision)
    plan = network.build((1,), for_this_gpu=False).plan
    return {"s": time.perf_counter() - started, "plan_mb": len(plan) / 1e6}


def _error(got: NDArray[Any], expected: NDArray[Any]) -> dict[str, float]:
    """Largest difference over the largest value, and the root mean squares' ratio."""
    difference, wanted = np.abs(got.astype(np.float64) - expected), np.abs(expected.astype(np.float64))
    rms = float(np.sqrt(np.mean(difference**2) / np.mean(wanted**2)))
    return {"largest": float(difference.max()), "relative": float(difference.max() / wanted.max()), "rms": rms}


STAGES = {"make": make, "diffusers": diffusers}
ENGINE_STAGES = {"openvino": openvino, "tensorrt": tensorrt}


def run(name: str, work: Path, model: str) -> None:
    """A stage by its name, such as ``make`` or ``openvino bfloat16``; prints its figures."""
    stage, _, precision = name.partition(" ")
    if stage in STAGES:
        figures = STAGES[stage](work, model)
    else:
        figures = ENGINE_STAGES[stage](work, model, "bfloat16" if precision == "bfloat16" else "float32")
    print(json.dumps(figures))  # noqa: T201
