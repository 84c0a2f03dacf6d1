"""Noise schedules as one float64 table: z_t = alpha_t x + sigma_t eps, alpha² + sigma² = 1.

Every schedule is tabulated at T indices; index k stands for time (k + 1)/T, and index -1 for the clean
end t = 0 (alpha = 1, sigma = 0 exactly). The network's timestep input is k. Training, sampling and stock
diffusers all read the same grid, so they cannot drift apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

IDLE_IN_COSINE = ("beta_start", "beta_end", "rescale_zero_terminal_snr")
"""Fields of the beta schedules: the cosine is a formula, and without bounds it ends in pure noise by itself."""

CLEAN = -1
"""Table index of the clean end, t = 0."""


class ScheduleSpec(BaseModel):
    """A schedule as it stands in recipes and manifests.

    kind ``cosine`` is the continuous log-SNR cosine, -2·log tan(a·t + b); without log-SNR bounds it is
    alpha = cos(pi t / 2), with zero terminal SNR. The other kinds are diffusers' beta schedules.
    Source: Salimans & Ho 2022, appendix; diffusers DDIMScheduler; Lin et al. 2023 (zero terminal SNR).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cosine", "linear", "scaled_linear", "squaredcos_cap_v2"] = "cosine"
    timesteps: int = Field(1000, ge=2, le=10_000)
    log_snr_min: float | None = None
    log_snr_max: float | None = None
    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)
    rescale_zero_terminal_snr: bool = False

    @model_validator(mode="after")
    def _bounds(self) -> ScheduleSpec:
        low, high = self.log_snr_min, self.log_snr_max
        if self.kind != "cosine" and (low is not None or high is not None):
            raise ValueError("log_snr_min and log_snr_max belong to kind: cosine")
        fields = type(self).model_fields
        idle = [name for name in IDLE_IN_COSINE if getattr(self, name) != fields[name].default]
        if self.kind == "cosine" and idle:
            raise ValueError(
                f"with kind: cosine, the default, these say nothing: {', '.join(idle)}; give another kind"
            )
        if low is not None and high is not None and low >= high:
            raise ValueError("log_snr_min must be below log_snr_max")
        return self


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha, sigma: (T,) float64 tables of a variance-preserving schedule."""

    spec: ScheduleSpec

    @cached_property
    def angles(self) -> NDArray[np.float64]:
        """phi_k = atan2(sigma_k, alpha_k): (T,) in radians, rising from near 0 to at most pi/2."""
        if self.spec.kind == "cosine":
            return _cosine_angles(self.spec)
        alpha_squared = np.cumprod(1.0 - _betas(self.spec))
        alpha = np.sqrt(alpha_squared)
        if self.spec.rescale_zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        return np.asarray(np.arccos(alpha))

    @property
    def timesteps(self) -> int:
        return self.spec.timesteps

    @cached_property
    def alpha(self) -> NDArray[np.float64]:
        alpha = np.cos(self.angles)
        if self.zero_terminal_snr:
            alpha[-1] = 0.0
        return alpha

    @cached_property
    def sigma(self) -> NDArray[np.float64]:
        return np.sin(self.angles)

    @property
    def log_snr(self) -> NDArray[np.float64]:
        """log(alpha² / sigma²): (T,), falling, -inf where the table ends in pure noise."""
        with np.errstate(divide="ignore"):
            return np.asarray(2 * (np.log(self.alpha) - np.log(self.sigma)))

    @property
    def zero_terminal_snr(self) -> bool:
        return bool(self.angles[-1] == np.pi / 2)

    def at(self, index: int) -> tuple[float, float]:
        """(alpha, sigma) at a table index; (1, 0) at CLEAN."""
        if index == CLEAN:
            return 1.0, 0.0
        self._check(index)
        return float(self.alpha[index]), float(self.sigma[index])

    def angle(self, index: int) -> float:
        """phi at a table index, in radians; 0 at CLEAN."""
        if index == CLEAN:
            return 0.0
        self._check(index)
        return float(self.angles[index])

    def grid(self, n: int) -> tuple[int, ...]:
        """The n + 1 table indices of an n-step grid, clean end first: round(T·i/n) - 1 for i = 0 … n.

        Equals diffusers' ``timestep_spacing="trailing"``, reversed and with the clean end added, but for
        n where diffusers' accumulated float step misrounds (of 1000: 48, and 61 where it overruns the end).
        Exact here, so every grid lies inside the grid of 2n.
        """
        if not 1 <= n <= self.timesteps:
            raise ValueError(f"a grid has 1 to {self.timesteps} steps, not {n}")
        points = np.round(self.timesteps * np.arange(n + 1) / n).astype(int) - 1
        return tuple(int(k) for k in points)

    def betas(self) -> NDArray[np.float64]:
        """(T,) betas whose cumulative product gives this table: diffusers' ``trained_betas``."""
        alpha_squared = np.concatenate([[1.0], self.alpha**2])
        return np.asarray(1.0 - alpha_squared[1:] / alpha_squared[:-1])

    def _check(self, index: int) -> None:
        if not 0 <= index < self.timesteps:
            raise IndexError(f"table index {index} is outside 0 … {self.timesteps - 1} (and {CLEAN} for clean)")


def _cosine_angles(spec: ScheduleSpec) -> NDArray[np.float64]:
    t = np.arange(1, spec.timesteps + 1) / spec.timesteps
    start = 0.0 if spec.log_snr_max is None else math.atan(math.exp(-spec.log_snr_max / 2))
    end = math.pi / 2 if spec.log_snr_min is None else math.atan(math.exp(-spec.log_snr_min / 2))
    angles = start + (end - start) * t
    angles[-1] = end  # (end - start)·1 + start may round off pi/2
    return np.asarray(angles)


def _betas(spec: ScheduleSpec) -> NDArray[np.float64]:
    n = spec.timesteps
    if spec.kind == "linear":
        return np.linspace(spec.beta_start, spec.beta_end, n)
    if spec.kind == "scaled_linear":
        return np.asarray(np.linspace(spec.beta_start**0.5, spec.beta_end**0.5, n) ** 2)
    bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1.0 - bar[1:] / bar[:-1], 0.999))
