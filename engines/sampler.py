"""Samplers as data: every denoising step is one row of coefficients.

    x̂   = clip(p·x_t + q·out, ±r)                    the clean estimate
    y    = a·x_t + b·x̂ + d·out + c·noise              the affine update
    x_s  = m·y + (1 - m)·(e·known + f·noise)          the inpainting blend (m = 1 generates)

``Step`` holds one row; ``SamplerPlan`` the rows of a whole trajectory. The same rows drive sampling,
evaluation, the stage-two target (``compose``) and the exported graph. Rows without clipping use d (b = 0),
clipped rows use b (d = 0). Coefficients are float64 here and enter graphs as float32.

Source: Song et al. 2021 (DDIM); Salimans & Ho 2022, eq. 9; Meng et al. 2023, section 3.2 and Alg. 3;
Song et al. 2023, Alg. 1 (consistency).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.schedule import CLEAN, NoiseSchedule

Prediction = Literal["v_prediction", "epsilon", "sample"]
Sampler = Literal["deterministic", "stochastic", "consistency"]
Array = Any  # numpy or torch: plain operators serve both

NO_CLIP = 3e38
"""r of a row that does not clip: the largest round number a float32 holds."""


@dataclass(frozen=True)
class Coefficients:
    """One row, in the order the graph reads it (see the module's formulas)."""

    p: float
    q: float
    r: float
    a: float
    b: float
    d: float
    c: float
    e: float
    f: float


COEFFICIENT_NAMES = tuple(Coefficients.__dataclass_fields__)


@dataclass(frozen=True)
class Step:
    """A denoising step from table index ``timestep`` to ``target`` (CLEAN at the end)."""

    timestep: int
    target: int
    coefficients: Coefficients

    @cached_property
    def row(self) -> NDArray[np.float32]:
        """(9,) float32, read-only: what the step graph takes as its ``coefficients`` input."""
        row = np.array(astuple(self.coefficients), dtype=np.float32)
        row.flags.writeable = False
        return row

    @property
    def stochastic(self) -> bool:
        return self.coefficients.c > 0

    def apply(self, x_t: Array, out: Array, noise: Array = 0.0) -> tuple[Array, Array]:
        """One update on numpy or torch arrays: (x_s, x̂), both shaped as x_t; no blend."""
        k = self.coefficients
        clean = k.p * x_t + k.q * out
        if k.r < NO_CLIP:
            clean = clean.clip(-k.r, k.r)
        x_s = k.a * x_t + (k.b * clean if k.b else k.d * out)
        return (x_s + k.c * noise if k.c else x_s), clean


@dataclass(frozen=True)
class SamplerPlan:
    """The steps of one trajectory, noisiest first."""

    sampler: Sampler
    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @property
    def timesteps(self) -> tuple[int, ...]:
        return tuple(step.timestep for step in self.steps)


def deterministic_step(
    schedule: NoiseSchedule, t: int, s: int, prediction: Prediction = "v_prediction", clip: float | None = None
) -> Step:
    """DDIM from table index t to s (CLEAN for the last step; s > t encodes). clip: bound on |x̂|, or None.

    Raises: ValueError when epsilon meets zero SNR, or a clipped row would encode.
    """
    a, d = _ddim(schedule, t, s, prediction)
    return _step(schedule, t, s, prediction, clip, a=a, d=d, c=0.0)


def stochastic_step(
    schedule: NoiseSchedule,
    t: int,
    k: int,
    s: int,
    prediction: Prediction = "v_prediction",
    clip: float | None = None,
) -> Step:
    """A deterministic step beyond the target t → k, then a noisy step back k → s (k < s < t)."""
    (alpha_k, sigma_k), (alpha_s, sigma_s) = schedule.at(k), schedule.at(s)
    g = alpha_s / alpha_k
    a, d = _ddim(schedule, t, k, prediction)
    c = math.sqrt(sigma_s**2 - (g * sigma_k) ** 2)
    return _step(schedule, t, k, prediction, clip, a=g * a, d=g * d, c=c, target=s, gain=g)


def sampler_plan(
    schedule: NoiseSchedule,
    n: int,
    sampler: Sampler = "deterministic",
    prediction: Prediction = "v_prediction",
    clip: float | None = None,
    start: int | None = None,
) -> SamplerPlan:
    """The plan of n network evaluations on the n-step grid.

    The stochastic sampler walks twice its grid's step and back with fresh noise; the consistency sampler walks to
    the clean end every time, and back from there. start: grid point to enter at, 1 … n (default n, pure noise); a
    plan entered at i has i steps.
    """
    grid = schedule.grid(n)
    first = n if start is None else start
    if not 1 <= first <= n:
        raise ValueError(f"start must be a grid point 1 … {n}, not {first}")
    steps = []
    for i in range(first, 0, -1):
        if sampler != "deterministic" and i >= 2:
            end = grid[i - 2] if sampler == "stochastic" else CLEAN
            steps.append(stochastic_step(schedule, grid[i], end, grid[i - 1], prediction, clip))
        else:
            steps.append(deterministic_step(schedule, grid[i], grid[i - 1], prediction, clip))
    return SamplerPlan(sampler, tuple(steps))


def encoder_plan(schedule: NoiseSchedule, n: int, prediction: Prediction = "v_prediction") -> SamplerPlan:
    """Deterministic inversion: n steps with time increasing, from a clean latent to pure noise. Never clipped.

    The first step starts at table index 0: at t = 0 itself a network was never trained.
    Raises: ValueError for a grid whose first point is index 0 already.
    """
    grid = schedule.grid(n)
    if grid[1] == 0:
        raise ValueError(f"an encoder needs fewer than {schedule.timesteps} steps, not {n}")
    points = (0, *grid[1:])
    steps = (deterministic_step(schedule, t, s, prediction) for t, s in pairwise(points))
    return SamplerPlan("deterministic", tuple(steps))


def entry_point(n: int, strength: float) -> int:
    """Grid point at which editing with ``strength`` in (0, 1] enters an n-step plan."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
    return max(1, math.floor(strength * n))


@dataclass(frozen=True)
class Composition:
    """Weights of the single output that does in one step what two steps did: x·z + first·out1 + second·out2."""

    x: float
    first: float
    second: float


def compose(first: Step, second: Step, whole: Step) -> Composition:
    """The stage-two target: the output with which ``whole`` lands where ``first`` then ``second`` do.

    All three unclipped and deterministic, ``first.timestep == whole.timestep``. For v-prediction this is
    [sin d1·(cos d2·v1 - sin d2·z) + sin d2·v2] / sin(d1 + d2), which never divides by alpha or sigma.
    """
    if first.target != second.timestep or first.timestep != whole.timestep or second.target != whole.target:
        raise ValueError("compose needs steps that meet: first ends where second starts, whole spans both")
    one, two, both = first.coefficients, second.coefficients, whole.coefficients
    if any(k.b or k.c for k in (one, two, both)):
        raise ValueError("compose needs unclipped deterministic steps")
    return Composition(
        x=(two.a * one.a - both.a) / both.d,
        first=two.a * one.d / both.d,
        second=two.d / both.d,
    )


def _ddim(schedule: NoiseSchedule, t: int, s: int, prediction: Prediction) -> tuple[float, float]:
    """(a, d) of the unclipped DDIM update x_s = a·x_t + d·out."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    if prediction == "v_prediction":
        delta = schedule.angle(t) - schedule.angle(s)
        return math.cos(delta), -math.sin(delta)
    if prediction == "epsilon":
        if alpha_t == 0:
            raise ValueError("epsilon-prediction is undefined at zero SNR; fine-tune the model to v-prediction")
        return alpha_s / alpha_t, sigma_s - alpha_s * sigma_t / alpha_t
    return sigma_s / sigma_t, alpha_s - alpha_t * sigma_s / sigma_t


def _clean_estimate(schedule: NoiseSchedule, t: int, prediction: Prediction) -> tuple[float, float]:
    """(p, q) with x̂ = p·x_t + q·out."""
    alpha_t, sigma_t = schedule.at(t)
    if prediction == "v_prediction":
        return alpha_t, -sigma_t
    if prediction == "epsilon":
        return 1 / alpha_t, -sigma_t / alpha_t
    return 0.0, 1.0


def _step(
    schedule: NoiseSchedule,
    t: int,
    k: int,
    prediction: Prediction,
    clip: float | None,
    *,
    a: float,
    d: float,
    c: float,
    target: int | None = None,
    gain: float = 1.0,
) -> Step:
    """Assemble a row from the unclipped (a, d, c); with clip, rewrite it in the x̂ form.

    gain: factor applied after the deterministic part t → k (the stochastic sampler's alpha_s/alpha_k).
    """
    end = k if target is None else target
    p, q = _clean_estimate(schedule, t, prediction)
    (alpha_t, sigma_t), (alpha_k, sigma_k) = schedule.at(t), schedule.at(k)
    b, r = 0.0, NO_CLIP
    if clip is not None:
        if k > t:
            raise ValueError("an encoding step must not clip: its x̂ form loses precision near the clean end")
        a, b, d, r = gain * sigma_k / sigma_t, gain * (alpha_k - alpha_t * sigma_k / sigma_t), 0.0, clip
    e, f = schedule.at(end)
    return Step(t, end, Coefficients(p=p, q=q, r=r, a=a, b=b, d=d, c=c, e=e, f=f))
