"""The stochastic sampler as a scheduler of diffusers: this very file is copied into the folders of its students.

So it needs diffusers and torch alone. Load such a pipeline with ``trust_remote_code=True``, which runs the copy.
Source: Meng et al. 2023, section 3.3.
"""

from __future__ import annotations

import math

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

CLEAN = -1


class StochasticScheduler(DDIMScheduler):  # type: ignore[misc]
    """DDIM's settings and timesteps, for networks that predict v, with steps of another kind.

    Each walks deterministically to the timestep after the next, and fresh noise takes it back to the next one; the
    last ends clean.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """The next sample and the clean estimate, both (B, C, h, w) as ``sample`` and of its type.

        model_output: the v of ``sample``, shaped as it; timestep: where the sample is; generator: of the noise.
        Raises: ValueError for a timestep that is none of ``timesteps``.
        """
        points = [*self.timesteps.tolist(), CLEAN]
        following = points[points.index(int(timestep)) + 1 :][:2]
        (alpha, sigma), (alpha_s, sigma_s), (alpha_k, sigma_k) = map(
            self._level, (int(timestep), following[0], following[-1])
        )
        x_t = sample.float()
        clean = alpha * x_t - sigma * model_output.float()
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        x_s = alpha_k * clean + sigma_k * (x_t - alpha * clean) / sigma
        if len(following) > 1:
            gain = alpha_s / alpha_k
            noise = randn_tensor(x_s.shape, generator=generator, device=x_s.device, dtype=x_s.dtype)
            x_s = gain * x_s + math.sqrt(sigma_s**2 - (gain * sigma_k) ** 2) * noise
        found = x_s.to(sample.dtype), clean.to(sample.dtype)
        return DDIMSchedulerOutput(*found) if return_dict else found

    def _level(self, timestep: int) -> tuple[float, float]:
        """(alpha, sigma) at a timestep."""
        kept = 1.0 if timestep == CLEAN else float(self.alphas_cumprod[timestep])
        return math.sqrt(kept), math.sqrt(1 - kept)
