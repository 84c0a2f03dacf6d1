"""Samplers as data: every denoising step is one row of coefficients.

    x̂   = clip(p·x_t + q·out, ±r)                    the clean estimate
    y    = a·x_t + b·x̂ + d·out + c·noise              the affine update
    x_s  = m·y + (1 - m)·(e·known + f·noise)          the inpainting blend (m = 1 generates)

``Step`` holds one row; ``SamplerPlan`` the rows of a whole trajectory. The same rows drive sampling,
evaluation, the stage-two target (``compose``) and the exported graph. Rows without clipping use d (b = 0),
clipped rows use b (d = 0). Coefficients are float64 here and enter graphs as float32.

Source: Ho et al. 2020, Alg. 2 (ancestral); Song et al. 2021 (DDIM); Salimans & Ho 2022, eq. 9; Meng et al. 2023,
section 3.3; Song et al. 2023, Alg. 1 (consistency).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.schedule import CLEAN, NoiseSchedule

Prediction = Literal["v_prediction", "epsilon", "sample"]
Sampler = Literal["deterministic", "stochastic", "consistency", "ancestral"]
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
    return _step(schedule, t, _Level.of(schedule, s), s, prediction, clip)


def stochastic_step(
    schedule: NoiseSchedule,
    t: int,
    k: int,
    s: int,
    prediction: Prediction = "v_prediction",
    clip: float | None = None,
) -> Step:
    """A deterministic step beyond the target t → k, then a noisy step back k → s (k < s < t)."""
    return _step(schedule, t, _Level.of(schedule, k), s, prediction, clip)


def ancestral_step(
    schedule: NoiseSchedule, t: int, s: int, prediction: Prediction = "v_prediction", clip: float | None = None
) -> Step:
    """DDPM's step t → s: a deterministic one to tan(phi) = tan(phi_s)² / tan(phi_t), and the noise back to s."""
    angle = math.atan(math.tan(schedule.angle(s)) ** 2 / math.tan(schedule.angle(t)))
    return _step(schedule, t, _Level(math.cos(angle), math.sin(angle), angle), s, prediction, clip)


def sampler_plan(
    schedule: NoiseSchedule,
    n: int,
    sampler: Sampler = "deterministic",
    prediction: Prediction = "v_prediction",
    clip: float | None = None,
    start: int | None = None,
) -> SamplerPlan:
    """The plan of n network evaluations on the n-step grid; see ``plan_through``."""
    return plan_through(schedule, schedule.grid(n)[:0:-1], sampler, prediction, clip, start)


def plan_through(
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    sampler: Sampler = "deterministic",
    prediction: Prediction = "v_prediction",
    clip: float | None = None,
    start: int | None = None,
) -> SamplerPlan:
    """The plan that asks the network at these n table indices, noisiest first, and ends clean.

    The stochastic sampler walks on to the point after the next and back with fresh noise; the consistency sampler
    walks to the clean end every time, and back from there; the ancestral sampler as far beyond each point as makes
    its noise that of the forward process. start: point to enter at, 1 … n (default n, pure noise); a plan entered
    at i has i steps.
    Raises: ValueError for timesteps that do not fall, or leave the table, and for no such start.
    """
    points, n = (CLEAN, *reversed(timesteps)), len(timesteps)
    if not all(s < t < schedule.timesteps for s, t in pairwise(points)):
        raise ValueError(f"timesteps must fall from at most {schedule.timesteps - 1} to at least 0")
    first = n if start is None else start
    if not 1 <= first <= n:
        raise ValueError(f"start must be a point 1 … {n}, not {first}")
    steps = []
    for i in range(first, 0, -1):
        t, s = points[i], points[i - 1]
        if sampler == "deterministic" or i == 1:
            steps.append(deterministic_step(schedule, t, s, prediction, clip))
        elif sampler == "ancestral":
            steps.append(ancestral_step(schedule, t, s, prediction, clip))
        else:
            end = points[i - 2] if sampler == "stochastic" else CLEAN
            steps.append(stochastic_step(schedule, t, end, s, prediction, clip))
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
    """Point of an n-step plan, from the clean end, at which editing with ``strength`` in (0, 1] enters it."""
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


@dataclass(frozen=True)
class _Level:
    """A noise level: alpha = cos(angle), sigma = sin(angle)."""

    alpha: float
    sigma: float
    angle: float

    @classmethod
    def of(cls, schedule: NoiseSchedule, index: int) -> _Level:
        return cls(*schedule.at(index), schedule.angle(index))


def _ddim(t: _Level, s: _Level, prediction: Prediction) -> tuple[float, float]:
    """(a, d) of the unclipped DDIM update x_s = a·x_t + d·out."""
    if prediction == "v_prediction":
        delta = t.angle - s.angle
        return math.cos(delta), -math.sin(delta)
    if prediction == "epsilon":
        if t.alpha == 0:
            raise ValueError("epsilon-prediction is undefined at zero SNR; fine-tune the model to v-prediction")
        return s.alpha / t.alpha, s.sigma - s.alpha * t.sigma / t.alpha
    return s.sigma / t.sigma, s.alpha - t.alpha * s.sigma / t.sigma


def _clean_estimate(t: _Level, prediction: Prediction) -> tuple[float, float]:
    """(p, q) with x̂ = p·x_t + q·out."""
    if prediction == "v_prediction":
        return t.alpha, -t.sigma
    if prediction == "epsilon":
        return 1 / t.alpha, -t.sigma / t.alpha
    return 0.0, 1.0


def _step(
    schedule: NoiseSchedule,
    t: int,
    beyond: _Level,
    target: int,
    prediction: Prediction,
    clip: float | None,
) -> Step:
    """The row of DDIM from t to ``beyond`` and, where that is not the target yet, a noisy step back to it.

    With clip the row has the x̂ form.
    """
    here, end = _Level.of(schedule, t), _Level.of(schedule, target)
    a, d = _ddim(here, beyond, prediction)
    p, q = _clean_estimate(here, prediction)
    gain = end.alpha / beyond.alpha if end != beyond else 1.0
    c = math.sqrt(end.sigma**2 - (gain * beyond.sigma) ** 2) if end != beyond else 0.0
    a, b, d, r = gain * a, 0.0, gain * d, NO_CLIP
    if clip is not None:
        if beyond.angle > here.angle:
            raise ValueError("an encoding step must not clip: its x̂ form loses precision near the clean end")
        a, d, r = gain * beyond.sigma / here.sigma, 0.0, clip
        b = gain * (beyond.alpha - here.alpha * beyond.sigma / here.sigma)
    return Step(t, target, Coefficients(p=p, q=q, r=r, a=a, b=b, d=d, c=c, e=end.alpha, f=end.sigma))
