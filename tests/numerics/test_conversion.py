"""The three prediction types mean the same v, also where the schedule was rescaled under the teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill_jobs.data.source import Condition
from distill_jobs.objectives import Noisy, Tables, wide
from distill_jobs.pipelines.conversion import NativeTeacher, as_v, imitation_loss
from distill_jobs.pipelines.probe import contradiction, middle, prediction_errors, unfit
from engines.sampler import Prediction
from engines.schedule import NoiseSchedule, ScheduleSpec

OWN = NoiseSchedule(ScheduleSpec(kind="scaled_linear"))
RESCALED = NoiseSchedule(ScheduleSpec(kind="scaled_linear", rescale_zero_terminal_snr=True))
ROWS = 6
SPREAD = 0.5


class Gaussian(nn.Module):
    """The exact network for data N(0, SPREAD²) on its own schedule, at whole and fractional timesteps."""

    def __init__(self, prediction: Prediction) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, z_t: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        angles = np.interp(timestep.double().numpy(), np.arange(OWN.timesteps), OWN.angles)
        alpha, sigma = (wide(torch.tensor(f(angles), dtype=torch.float32), z_t) for f in (np.cos, np.sin))
        clean = alpha * SPREAD**2 * z_t / (alpha**2 * SPREAD**2 + sigma**2)
        noise = (z_t - alpha * clean) / sigma
        outputs = {"sample": clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean}
        return (outputs[self.prediction],)


def rows(t: list[int], seed: int = 0) -> Noisy:
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn((len(t), 1, 2, 2), generator=generator) for _ in range(2))
    tokens = Condition(torch.zeros(len(t), 1, 4))
    return Noisy(x * SPREAD, tokens, tokens, noise, torch.tensor(t))


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_every_output_means_the_same_v(prediction: Prediction) -> None:
    drawn = rows([0, 10, 300, 600, 900, 999])
    tables = Tables.of(OWN)
    z_t, v = tables.noisy(drawn)
    out = drawn.noise if prediction == "epsilon" else drawn.x
    alpha, sigma = tables.alpha[drawn.t].double(), tables.sigma[drawn.t].double()
    found = as_v(out.double(), z_t.double(), alpha, sigma, prediction)
    torch.testing.assert_close(found.float(), v, rtol=0, atol=1e-4)
    assert as_v(v, z_t, alpha, sigma, "v_prediction") is v


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("points", [OWN, RESCALED], ids=["own", "rescaled"])
def test_a_native_teacher_is_asked_where_its_noise_is_the_same(
    prediction: Prediction, points: NoiseSchedule
) -> None:
    drawn = rows([5, 100, 300, 500, 700, 800])
    teacher = NativeTeacher.of(Gaussian(prediction), prediction, OWN, points)
    tables = Tables.of(points)
    z_t, _ = tables.noisy(drawn)
    assert teacher.known[drawn.t].all()
    alpha, sigma = (wide(table[drawn.t], z_t) for table in (tables.alpha, tables.sigma))
    expected = alpha * sigma * (1 - SPREAD**2) * z_t / (alpha**2 * SPREAD**2 + sigma**2)
    torch.testing.assert_close(teacher.v(z_t, drawn, drawn.condition), expected, rtol=0, atol=2e-4)


def test_whole_timesteps_stay_whole_on_its_own_schedule() -> None:
    teacher = NativeTeacher.of(Gaussian("epsilon"), "epsilon", OWN, OWN)
    torch.testing.assert_close(teacher.timestep, torch.arange(1000.0), rtol=0, atol=1e-3)
    assert teacher.known.all()


def test_points_beyond_its_schedule_are_learned_from_the_data() -> None:
    teacher = NativeTeacher.of(Gaussian("epsilon"), "epsilon", OWN, RESCALED)
    assert not teacher.known[999]
    drawn = rows([999, 999, 500])
    _, v = teacher.tables.noisy(drawn)

    class Fixed(nn.Module):
        def forward(self, *_: Any, **__: Any) -> tuple[Tensor]:
            return (v,)

    losses = imitation_loss(Fixed(), teacher, drawn, torch.zeros(3, dtype=torch.bool))
    assert losses[:2].tolist() == [0, 0]
    assert losses[2] > 0.01
    assert torch.isfinite(losses).all()


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("timesteps", [1000, 500, 4000])
def test_a_rescaled_schedule_is_beyond_its_own_at_the_noisy_end_alone(kind: Any, timesteps: int) -> None:
    """Rescaling leaves the cleanest point where it was, but for rounding."""
    betas = {} if kind == "squaredcos_cap_v2" else {"beta_start": 0.0001, "beta_end": 0.02}
    own = NoiseSchedule(ScheduleSpec(kind=kind, timesteps=timesteps, **betas))
    rescaled = NoiseSchedule(own.spec.model_copy(update={"rescale_zero_terminal_snr": True}))
    teacher = NativeTeacher.of(Gaussian("epsilon"), "epsilon", own, rescaled)
    noisier = torch.tensor(rescaled.alpha < own.alpha[-1])
    assert torch.equal(teacher.known, ~noisier)
    assert 0 < int(noisier.sum()) < timesteps / 2
    assert float(teacher.timestep[0]) == pytest.approx(0, abs=1e-6)


class Trained(nn.Module):
    """Tells signal from noise but for a share: as networks of images do, where those of Gaussian data cannot."""

    def __init__(self, prediction: Prediction, drawn: Noisy, missed: float = 0.1) -> None:
        super().__init__()
        self.prediction, self.drawn, self.missed = prediction, drawn, missed

    def forward(self, z_t: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        alpha, sigma = (wide(table[self.drawn.t], z_t) for table in (Tables.of(OWN).alpha, Tables.of(OWN).sigma))
        clean = (1 - self.missed) * self.drawn.x
        noise = (z_t - alpha * clean) / sigma
        outputs = {"sample": clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean}
        return (outputs[self.prediction],)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_network_shows_what_it_predicts(prediction: Prediction) -> None:
    drawn = rows([middle(OWN)] * 64)
    errors = prediction_errors(Trained(prediction, drawn), Tables.of(OWN), drawn)
    for says in errors:
        assert contradiction(says, errors) == (None if says == prediction else prediction)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_network_that_cannot_tell_is_believed(prediction: Prediction) -> None:
    drawn = rows([middle(OWN)] * 64)
    errors = prediction_errors(Gaussian(prediction), Tables.of(OWN), drawn)
    assert contradiction(prediction, errors) is None
    knows_nothing = prediction_errors(Trained(prediction, drawn, missed=1.0), Tables.of(OWN), drawn)
    assert contradiction(prediction, knows_nothing) is None


def test_a_teacher_that_does_not_fit_its_data_or_cannot_be_guided_is_named() -> None:
    assert unfit(0.2, 0.3, 0.9) is None
    assert unfit(0.2, 0.85, 0.9) is None
    assert "scaling_factor" in str(unfit(1.0, 1.0, 0.9))
    assert "cannot be guided" in str(unfit(0.2, 1.5, 0.9))
    assert unfit(20.0, 25.0, 100) is None
    assert unfit(math.nan, 0.3, 0.9)


def test_errors_without_prompts_are_asked_for_without_them() -> None:
    class Prompted(nn.Module):
        """Knows nothing of rows without a prompt, whose tokens are ones."""

        def forward(self, z_t: Tensor, *told: Any, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
            (known,) = Trained("epsilon", drawn)(z_t)
            return (torch.where(wide(encoder_hidden_states[:, 0, 0], z_t) > 0, torch.zeros_like(known), known),)

    drawn = rows([middle(OWN)] * 64)
    drawn = replace(drawn, null=Condition(torch.ones_like(drawn.condition.tokens)))
    errors = [prediction_errors(Prompted(), Tables.of(OWN), drawn, prompted=told) for told in (True, False)]
    assert errors[0]["epsilon"] < 0.1
    assert errors[1]["epsilon"] == pytest.approx(1)
