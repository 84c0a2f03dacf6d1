"""One image in the making, and where it may begin: at noise, at a noised image, or at an inverted one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.errors import RequestError
from engines.guidance import weight_from_scale
from engines.manifest import BundleManifest, Size, StudentSpec
from engines.noise import Purpose, row_noise
from engines.sampler import SamplerPlan, Step, entry_point

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Leg:
    """A stretch of a row's way on one step graph. condition: (T, D); w: guidance weight."""

    student: StudentSpec
    plan: SamplerPlan
    w: float
    condition: Floats


@dataclass(eq=False)
class Row:
    """One image in the making; ``Pipeline.step`` advances it along its legs.

    latent, clean: (C, h, w) current latent and last clean estimate; noise: (C, h, w), the row's own, which also
    re-noises known regions; known, mask: (C, h, w) and (1, h, w), mask 1 where the image is generated; masked:
    (C, h, w) clean latent of the image without what is generated, for networks that see it; position: steps
    done, over all legs.
    """

    legs: tuple[Leg, ...]
    seed: int
    latent: Floats
    noise: Floats
    known: Floats
    mask: Floats
    clean: Floats
    masked: Floats | None = None
    position: int = 0

    @property
    def leg(self) -> Leg:
        """The leg of the next step; of a finished row, the last."""
        return self.legs[self._at()[0]]

    @property
    def step(self) -> Step:
        """The next step."""
        leg, index = self._at()
        return self.legs[leg].plan.steps[index]

    @property
    def batch_key(self) -> tuple[str, tuple[int, ...]]:
        """Rows with equal keys share a step: (step graph, latent shape)."""
        return self.leg.student.graph, self.latent.shape

    @property
    def steps(self) -> int:
        """Steps of all legs."""
        return sum(len(leg.plan) for leg in self.legs)

    @property
    def steps_left(self) -> int:
        return self.steps - self.position

    @property
    def done(self) -> bool:
        return self.steps_left == 0

    def step_noise(self) -> Floats:
        """(C, h, w): fresh where the next step adds some; else the row's own."""
        _, index = self._at()
        if self.step.stochastic:
            return row_noise(self.seed, self.latent.shape, Purpose.STEP, index)
        return self.noise

    def _at(self) -> tuple[int, int]:
        """(leg, step within it) of the next step."""
        index, last = self.position, len(self.legs) - 1
        for number, leg in enumerate(self.legs):
            if index < len(leg.plan) or number == last:
                return number, index
            index -= len(leg.plan)
        raise AssertionError("a row has at least one leg")


@dataclass(frozen=True, eq=False)
class Drawing:
    """What all images of a request share.

    condition: (T, D) of the prompt; guidance_scale: as users give it; masked: (C, h, w) as of ``Row``, where the
    manifest's networks see masks.
    """

    manifest: BundleManifest
    student: StudentSpec
    condition: Floats
    guidance_scale: float
    masked: Floats | None = None

    def from_noise(self, seed: int, size: Size | None = None) -> Row:
        """Text to image: all steps of the student, from pure noise."""
        at = size or self.manifest.sizes[0]
        noise = self._noise(seed, (self.manifest.latent.channels, at.latent_height, at.latent_width))
        return self._row((self._leg(),), seed, self._initial(noise), noise)

    def from_image(self, seed: int, known: Floats, strength: float, mask: Floats | None = None) -> Row:
        """Editing by noising (SDEdit), and inpainting where there is a mask.

        known: (C, h, w) clean latent of the image; strength: (0, 1], entered at the student's point
        max(1, floor(strength·N)); mask: (1, h, w), 1 where the image is generated. With one, and all
        steps, drawing starts from pure noise, as in diffusers: nothing hidden shines through, even on a schedule
        that does not end there.
        """
        point, noise = entry_point(self.student.steps, strength), self._noise(seed, known.shape)
        leg = self._leg(point)
        if mask is not None and point == self.student.steps:
            return self._row((leg,), seed, self._initial(noise), noise, known, mask)
        alpha, sigma = self.manifest.noise_level(leg.plan.steps[0].timestep)
        latent = (alpha * known + sigma * noise).astype(np.float32)
        return self._row((leg,), seed, latent, noise, known, mask)

    def from_inversion(self, seed: int, known: Floats, encoder: StudentSpec, source: Floats) -> Row:
        """Editing by inversion: encode under the source prompt's condition with guidance off, then draw.

        known: (C, h, w) clean latent of the image; source: (T, D).
        """
        invert = Leg(encoder, self.manifest.inversion(encoder), 0.0, source)
        return self._row((invert, self._leg()), seed, known, self._noise(seed, known.shape), known)

    def _leg(self, start: int | None = None) -> Leg:
        plan = self.manifest.plan(self.student, start)
        return Leg(self.student, plan, weight_from_scale(self.guidance_scale), self.condition)

    def _initial(self, noise: Floats) -> Floats:
        """Where drawing from nothing starts."""
        return noise * np.float32(self.manifest.latent.initial_std)

    def _noise(self, seed: int, shape: tuple[int, ...]) -> Floats:
        return row_noise(seed, shape, Purpose.INITIAL)

    def _row(
        self,
        legs: tuple[Leg, ...],
        seed: int,
        latent: Floats,
        noise: Floats,
        known: Floats | None = None,
        mask: Floats | None = None,
    ) -> Row:
        return Row(
            legs=legs,
            seed=seed,
            latent=latent,
            noise=noise,
            known=np.zeros_like(latent) if known is None else known,
            mask=np.ones((1, *latent.shape[1:]), np.float32) if mask is None else mask,
            clean=np.zeros_like(latent),
            masked=self.masked,
        )


def inverts(student: StudentSpec) -> bool:
    """Whether a student can draw from the noise that an image was inverted to, instead of its own."""
    return student.sampler == "deterministic" or student.steps == 1


def find_encoder(manifest: BundleManifest, student: StudentSpec, wanted: int | None = None) -> StudentSpec:
    """The encoder of ``wanted`` steps; else one to go with a student: of as many steps, or of the most.

    Raises: RequestError when the bundle has none, or none of the wanted steps; or where the student's fresh noise
    would take the place of the image's own.
    """
    if not manifest.encoders:
        message = "mode invert needs a model with an encoder, and this one has none; use mode noise."
        raise RequestError("mode", "unsupported_value", message)
    if not inverts(student):
        message = (
            f"mode invert needs the deterministic sampler, and that of {student.steps} steps is {student.sampler}: "
            "its fresh noise would take the place of the image's own. Take other steps, or mode noise."
        )
        raise RequestError("sampler", "unsupported_value", message)
    by_steps = {encoder.steps: encoder for encoder in manifest.encoders}
    if wanted is not None and wanted not in by_steps:
        trained = ", ".join(str(n) for n in sorted(by_steps))
        message = f"encoder_steps must be one this model has an encoder for: {trained}."
        raise RequestError("encoder_steps", "out_of_range", message)
    return by_steps[wanted] if wanted is not None else by_steps.get(student.steps, by_steps[max(by_steps)])
