"""What AUTOMATIC1111's clients read: images with their ``info``."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from PIL import Image
from starlette.responses import Response

from server.api.a1111_fields import TextWish
from server.api.answers import result_of
from server.encoding import infotext
from server.images import write_png
from server.jobs import JobState, JobStatus


def images_answer(state: JobState, wish: TextWish, adjusted: dict[str, Any]) -> Response:
    """adjusted: what the client asked for in vain, by field. ``info`` has keys of what is not done here, too.

    Source of those: AUTOMATIC1111/stable-diffusion-webui, modules/processing.py, ``Processed.js``.
    Raises: ApiError when the job failed.
    """
    request = state.job.request
    interrupted = state.status is JobStatus.CANCELLED
    files = () if interrupted else result_of(state).images
    seeds = [image.seed for image in files]
    used = {
        "prompt": request.prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "steps": request.steps,
        "cfg_scale": request.guidance_scale,
        "sampler_name": request.sampler,
        "batch_size": wish.batch_size or 1,
        "n_iter": wish.n_iter or 1,
        "denoising_strength": request.effective_strength,
    }
    info = {
        **used,
        "all_prompts": [request.prompt] * len(seeds),
        "negative_prompt": "",
        "all_negative_prompts": [""] * len(seeds),
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(seeds),
        "styles": [],
        "index_of_first_image": 0,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(state.job.created_s)),
        "sd_model_name": request.model,
        "interrupted": interrupted,
        "infotexts": [infotext(request, seed) for seed in seeds],
        "adjusted": adjusted,
        "flagged": [image.flagged for image in files],
    }
    black = write_png(Image.new("RGB", (request.width, request.height)))  # these clients know no gap in the list
    sent = () if wish.send_images is False else files
    shown = [black if image.flagged else image.inline() for image in sent]
    images = [base64.b64encode(data).decode("ascii") for data in shown]
    body = {"images": images, "parameters": used, "info": json.dumps(info)}
    return Response(json.dumps(body), media_type="application/json")
