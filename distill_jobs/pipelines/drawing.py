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
from distill_jobs.recipe import Recipe
from distill_jobs.sampling import SEED_STRIDE, Network
from engines.sampler import encoder_plan
from engines.schedule import NoiseSchedule


@dataclass(frozen=True)
class LatentSampler:
    """What all networks of a run are asked with.

    prompts: n conditions, one a row of what is drawn; null: the empty one, one row; blank: (1, K, h, w) what
    networks for inpainting see of an image that is hidden as a whole, None for others.
    """

    recipe: Recipe
    device: torch.device
    prompts: Condition
    null: Condition
    blank: Tensor | None

    def draw(
        self, contender: Contender, unet: UNet2DConditionModel, scale: float, seed: int, seen: Tensor | None = None
    ) -> Tensor:
        """(n, C, h, w) latents. unet: on the device; seen: (n, K, h, w) in place of ``blank``.

        Raises: JobError when they are not finite.
        """
        unseeing = self._network(contender, unet, scale, self.blank) if seen is None else None

        def drawn(rows: slice, seeds: Sequence[int]) -> Tensor:
            network = unseeing or self._network(contender, unet, scale, None if seen is None else seen[rows])
            return contender.draw(network, self.recipe, self.prompts[rows], seeds)

        return self._batched(contender, seed, drawn)

    def blend(
        self,
        contender: Contender,
        unet: UNet2DConditionModel,
        scale: float,
        seed: int,
        known: Tensor,
        masks: Tensor,
    ) -> Tensor:
        """(n, C, h, w) latents; known: (n, C, h, w) is blended in at every step where masks: (n, 1, h, w) are 0."""
        network, plan = self._network(contender, unet, scale, self.blank), contender.plan(self.recipe)

        def drawn(rows: slice, seeds: Sequence[int]) -> Tensor:
            return blend(network, plan, self.recipe, self.prompts[rows], seeds, known[rows], masks[rows])

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
