"""A random bundle's students in eager torch, with the stock diffusers network and scheduler, one image a time.

Edits and inpaintings go as in diffusers' own pipelines: noise is added to the image at the entry point, and after
each step what the mask keeps is put back, noised to the next timestep.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill_jobs.data.digits import class_condition
from distill_jobs.graphs import DecodeGraph, EncodeGraph
from distill_jobs.student import predict, stock_scheduler
from engines.bundle import verify_bundle
from engines.condition import load_tokenizer
from engines.guidance import weight_from_scale
from engines.masks import latent_mask, paste_known
from engines.noise import Purpose, row_noise
from engines.sampler import entry_point
from engines.schedule import NoiseSchedule
from tests.benchmarks.load import Pixels
from tests.benchmarks.random_bundle import UPSCALE, RandomOptions, random_network
from tests.benchmarks.wishes import Wish


class EagerStudent:
    """The networks that the bundle's step graphs were made of."""

    def __init__(self, path: Path) -> None:
        bundle = verify_bundle(path)
        self._manifest, self._tokenizer = bundle.manifest, load_tokenizer(bundle)
        options = RandomOptions.of(bundle.manifest)
        networks: dict[str, UNet2DConditionModel] = {}
        for student in bundle.manifest.students:
            if student.graph not in networks:
                networks[student.graph] = random_network(options, student.steps)
        self._students = {s.steps: (networks[s.graph], s.grid) for s in bundle.manifest.students}
        channels = bundle.manifest.latent.channels
        self._decode, self._encode = DecodeGraph(channels, UPSCALE), EncodeGraph(channels, UPSCALE)

    @torch.inference_mode()
    def make(self, wish: Wish) -> Pixels:
        """(H, W, 3)."""
        size = self._manifest.sizes[0]
        shape = (self._manifest.latent.channels, size.latent_height, size.latent_width)
        noise = torch.from_numpy(row_noise(wish.seed, shape, Purpose.INITIAL))[None]
        known = None if wish.image is None else self._encode(torch.from_numpy(wish.known().copy())[None])
        mask = None
        if wish.task == "inpaint":
            mask = torch.from_numpy(latent_mask(wish.generated(), size))[None]
        drawn: Pixels = self._decode(self._denoise(wish, noise, known, mask))[0].numpy()
        return paste_known(drawn, wish.known(), wish.generated()) if wish.task == "inpaint" else drawn

    def _denoise(self, wish: Wish, noise: Tensor, known: Tensor | None, mask: Tensor | None) -> Tensor:
        unet, grid = self._students[wish.steps]
        scheduler = stock_scheduler(NoiseSchedule(self._manifest.schedule), self._manifest.clip)
        scheduler.set_timesteps(wish.steps)
        timesteps, latent = scheduler.timesteps, noise
        if known is not None and wish.strength is not None:
            timesteps = timesteps[wish.steps - entry_point(wish.steps, wish.strength) :]
            latent = scheduler.add_noise(known, noise, timesteps[:1])
        condition = class_condition(torch.from_numpy(np.array(self._tokenizer.encode(wish.prompt))))
        w = torch.tensor([weight_from_scale(wish.guidance_scale)])
        of_grid = None if grid is None else torch.tensor([grid])
        for i, t in enumerate(timesteps):
            out = predict(unet, latent, t[None].float(), condition, w, grid=of_grid)
            latent = scheduler.step(out, t, latent).prev_sample
            if known is not None and mask is not None:
                following = timesteps[i + 1 : i + 2]
                kept = scheduler.add_noise(known, noise, following) if len(following) else known
                latent = mask * latent + (1 - mask) * kept
        return latent
