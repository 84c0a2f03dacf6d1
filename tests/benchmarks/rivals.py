"""The same student behind other servers, as their own documentation would have it.

litserve: Lightning's dynamic batching over the same engine and pipeline; a batch is made to its end before the
next one starts. diffusers: FastAPI around stock diffusers in eager torch, one request at a time.
Run: python -m tests.benchmarks.rivals litserve BUNDLE PORT --batch 8 --wait-ms 5
     python -m tests.benchmarks.rivals diffusers PORT [--tiny]
"""

import base64
import io
import threading
from pathlib import Path
from typing import Annotated, Any

import litserve
import numpy as np
import torch
import typer
import uvicorn
from diffusers import DDIMScheduler
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

from distill_jobs.data.digits import class_condition
from distill_jobs.data.source import Condition
from distill_jobs.student import predict
from engines.guidance import weight_from_scale
from engines.noise import Purpose, row_noise
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.benchmarks.random_bundle import TINY_UNET, UNET, UPSCALE, RandomOptions, random_student

PATH = "/predict"

app = typer.Typer(add_completion=False)


class Wish(BaseModel):
    """What the load asks of every server."""

    prompt: str
    guidance_scale: float
    steps: int
    seed: int


def make_together(pipeline: Pipeline, wishes: list[Wish]) -> list[np.ndarray]:
    """All of a batch, in lockstep: a row that is done leaves, nobody joins."""
    conditions = pipeline.condition([wish.prompt for wish in wishes])
    rows = [
        pipeline.start(condition, wish.guidance_scale, wish.seed, pipeline.student(wish.steps))
        for condition, wish in zip(conditions, wishes, strict=True)
    ]
    while alive := [row for row in rows if not row.done]:
        groups: dict[Any, list[Any]] = {}
        for row in alive:
            groups.setdefault(row.batch_key, []).append(row)
        for group in groups.values():
            pipeline.step(group)
    return list(pipeline.decode([row.latent for row in rows]))


def jpeg(pixels: np.ndarray) -> dict[str, str]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return {"image": base64.b64encode(file.getvalue()).decode()}


class StudentAPI(litserve.LitAPI):
    """batching as LitServe does it: up to ``max_batch_size`` requests that came within ``batch_timeout``."""

    def __init__(self, bundle: Path, batch: int, wait_s: float) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=wait_s, api_path=PATH)
        self._bundle = bundle

    def setup(self, device: str) -> None:
        self._pipeline = open_pipeline(self._bundle)

    def decode_request(self, request: Wish) -> Wish:
        return request

    def batch(self, inputs: list[Wish]) -> list[Wish]:
        return inputs

    def predict(self, x: Wish | list[Wish]) -> Any:
        return make_together(self._pipeline, x) if isinstance(x, list) else make_together(self._pipeline, [x])[0]

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        return output

    def encode_response(self, output: np.ndarray) -> dict[str, str]:
        return jpeg(output)


@app.command("litserve")
def serve_litserve(
    bundle: Path,
    port: int,
    batch: Annotated[int, typer.Option(min=1, help="Largest batch.")] = 8,
    wait_ms: Annotated[float, typer.Option(min=0, help="Longest wait for a batch to fill.")] = 5.0,
) -> None:
    """LitServe over the bundle's own engine."""
    api = StudentAPI(bundle, batch, wait_ms / 1000)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")


@app.command("diffusers")
def serve_diffusers(port: int, tiny: Annotated[bool, typer.Option("--tiny")] = False) -> None:
    """FastAPI around the stock network and scheduler."""
    uvicorn.run(_diffusers_app(tiny), host="127.0.0.1", port=port, log_level="warning")


def _diffusers_app(tiny: bool) -> FastAPI:
    options = RandomOptions(unet=TINY_UNET if tiny else UNET)
    unet = random_student(options, 4)
    betas = NoiseSchedule(ScheduleSpec()).betas()
    lock, server = threading.Lock(), FastAPI()

    @server.get("/health")
    def health() -> str:
        return "ok"

    @server.post(PATH)
    def make(wish: Wish) -> dict[str, str]:
        scheduler = DDIMScheduler(
            trained_betas=betas, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
        )
        scheduler.set_timesteps(wish.steps)
        latent = torch.from_numpy(row_noise(wish.seed, options.latent, Purpose.INITIAL))[None]
        condition = class_condition(torch.tensor([wish.seed % 10]))
        w = torch.tensor([weight_from_scale(wish.guidance_scale)])
        with lock, torch.inference_mode():  # eager torch on all cores: two at once are slower than one by one
            for t in scheduler.timesteps:
                out = predict(unet, latent, t[None].float(), Condition(condition), w)
                latent = scheduler.step(out, t, latent).prev_sample
        pixels = ((latent[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return jpeg(pixels.repeat(UPSCALE, 0).repeat(UPSCALE, 1))

    return server


if __name__ == "__main__":
    app()
