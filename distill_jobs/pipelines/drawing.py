"""Latents drawn in batches on the run's device, from the noise that requests with the same seeds start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill_jobs.contenders import Contender
from distill_jobs.data.source import Condition
from distill_jobs.errors import JobError
from distill_jobs.inpainting import blend
from distill_jobs.inversion import SCALE_OFF, walk
from distill_jobs.pipelines.kept import KeptDraws, Networks, fingerprint_of
from distill_jobs.recipe import Recipe
from distill_jobs.sampling import SEED_STRIDE, Network
from engines.sampler import encoder_plan
from engines.schedule import NoiseSchedule

ASKED_CHARS = 12
"""Of the hash of what is asked: the folder of its latents."""


@dataclass(frozen=True)
class LatentSampler:
    """What all networks of a run are asked with.

    networks: on the device; kept: what was drawn before. prompts: n conditions, one a row of what is drawn; null:
    the empty one, one row; blank: (1, K, h, w) what networks for inpainting see of an image that is hidden as a
    whole, None for others.
    """

    recipe: Recipe
    networks: Networks
    kept: KeptDraws
    prompts: Condition
    null: Condition
    blank: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.networks.device

    def draw(self, contender: Contender, scale: float, seed: int) -> Tensor:
        """(n, C, h, w) latents, drawn once. Raises: JobError when they are not finite; StorageError."""
        recipe, told = self.recipe, (self.prompts, self.null)
        tensors = [part for each in told for part in (each.tokens, each.pooled, each.time_ids)]
        asked = fingerprint_of([], [*tensors, self.blank])
        key = f"{asked[:ASKED_CHARS]}/{contender.key}-g{scale:g}-s{seed}"
        weights, schedule = self.networks.sha256(contender), recipe.schedule.model_dump(mode="json")
        parts = [asked, contender.key, contender.shape, weights, recipe.unet, scale, seed, schedule, recipe.clip]
        if limits := contender.limits(scale):
            parts.append(limits)
        fingerprint = fingerprint_of(parts, [])

        def drawn() -> Tensor:
            network = self._network(contender, self.networks.of(contender), scale, self.blank)
            return self._batched(
                contender, seed, lambda rows, seeds: contender.draw(network, recipe, self.prompts[rows], seeds)
            )

        return self.kept.latents(key, fingerprint, drawn)

    def paint(self, contender: Contender, scale: float, seed: int, seen: Tensor) -> Tensor:
        """(n, C, h, w) latents of a network that sees (n, K, h, w) of an image behind a mask. Raises: JobError."""
        unet = self.networks.of(contender)

        def drawn(rows: slice, seeds: Sequence[int]) -> Tensor:
            network = self._network(contender, unet, scale, seen[rows])
            return contender.draw(network, self.recipe, self.prompts[rows], seeds)

        return self._batched(contender, seed, drawn)

    def blend(self, contender: Contender, scale: float, seed: int, known: Tensor, masks: Tensor) -> Tensor:
        """(n, C, h, w) latents; known: (n, C, h, w) is blended in at every step where masks: (n, 1, h, w) are 0."""
        network = self._network(contender, self.networks.of(contender), scale, self.blank)
        plan = contender.plan(self.recipe)

        def drawn(rows: slice, seeds: Sequence[int]) -> Tensor:
            return blend(network, plan, self.prompts[rows], seeds, known[rows], masks[rows])

        return self._batched(contender, seed, drawn)

    def there_and_back(
        self, decoder: Contender, unet: UNet2DConditionModel, inverter: UNet2DConditionModel, known: Tensor
    ) -> Tensor:
        """(n, C, h, w) what known: (n, C, h, w) is after inversion and drawing, with guidance off both ways.

        inverter: the encoder's network, of as many steps as the decoder's, or the teacher's own; on the device.
        """
        encode, decode = (self._network(decoder, network, SCALE_OFF, self.blank) for network in (inverter, unet))
        there = encoder_plan(NoiseSchedule(self.recipe.schedule), decoder.steps)
        back = decoder.plan(self.recipe)

        def drawn(rows: slice, _: Sequence[int]) -> Tensor:
            condition = self.prompts[rows]
            return walk(decode, back, condition, walk(encode, there, condition, known[rows]))

        return self._batched(decoder, 0, drawn)

    def _network(
        self, contender: Contender, unet: UNet2DConditionModel, scale: float, seen: Tensor | None
    ) -> Network:
        """Of tensors on the CPU, run on the device."""
        there = None if seen is None else seen.to(self.device)
        network = contender.network(unet, scale, there, null=self.null.to(self.device))

        def from_here(x_t: Tensor, timestep: int, condition: Condition) -> Tensor:
            return network(x_t.to(self.device), timestep, condition.to(self.device)).cpu()

        return from_here

    def _batched(self, contender: Contender, seed: int, drawn: Callable[[slice, Sequence[int]], Tensor]) -> Tensor:
        size, batches, first_seed = self.recipe.evaluation.batch_size, [], seed * SEED_STRIDE
        for first in range(0, len(self.prompts), size):
            last = min(first + size, len(self.prompts))
            batches.append(drawn(slice(first, last), range(first_seed + first, first_seed + last)))
        latents = torch.cat(batches)
        if not torch.isfinite(latents).all():
            raise JobError(f"{contender.key}: the network gives NaN or infinity; train it again")
        return latents
