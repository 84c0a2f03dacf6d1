"""Whether pictures show what their prompts ask for: the nearest glyph in the features of the glyph encoder.

Prompts are names of glyphs that training saw, each drawn twice; and compositions that it never saw: a glyph in
another colour, and two glyphs side by side, each judged in its own half of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from distill_jobs.contenders import STUDENT, TEACHER, Contender
from distill_jobs.data.colours import colour_of
from distill_jobs.data.scenes import Scenes, colours_for
from distill_jobs.gates import EXPORTED, FRECHET, Gate, title
from distill_jobs.glyph_encoder import GlyphEncoder, as_tensor
from distill_jobs.metrics import frechet_distance
from distill_jobs.pipelines.drawing import LatentSampler
from distill_jobs.pipelines.sheet import levels
from engines.manifest import EvaluationRow, Measured

GLYPHS, DATA = "glyphs", "data"
TOP_1, TOP_5, DIVERSITY = "glyph_top_1", "glyph_top_5", "glyph_diversity"
RECOLOURED, PAIRED = "recoloured_agreement", "pair_agreement"
COMPOSITIONS = 100
"""Held-out recolourings, and as many held-out pairs; fewer where there are not so many."""

SHOWN_NAMES, SHOWN_COMPOSITIONS = 40, 12
ENCODED_ROWS = 100
LEAST_TOP_1, LEAST_TOP_5, LEAST_OF_TEACHERS, LEAST_COMPOSED = 0.8, 0.92, 0.95, 0.5
DISTANCE_LIMITS = {4: 1.15, 1: 2.0}


@dataclass(frozen=True)
class Asked:
    """A prompt, the glyphs it asks for from left to right, and the colour, where it asks for one."""

    prompt: str
    names: tuple[str, ...]
    colour: str | None = None


@dataclass(frozen=True)
class Asking:
    """All prompts: ``twins`` names, each twice in a row, then held-out recolourings, then held-out pairs."""

    twins: tuple[Asked, ...]
    recoloured: tuple[Asked, ...]
    pairs: tuple[Asked, ...]

    @property
    def prompts(self) -> list[str]:
        return [asked.prompt for asked in (*self.twins, *self.recoloured, *self.pairs)]

    def drawn(self, scenes: Scenes, seed: int) -> list[Image.Image]:
        """What every prompt asks for, as ``scenes`` draws it."""
        by_name = {glyph.name: glyph for glyph in scenes.seen}
        rng = np.random.default_rng(seed)

        def picture(asked: Asked) -> Image.Image:
            first, *second = (by_name[name] for name in asked.names)
            if asked.colour:
                return scenes.recoloured(first, asked.colour, rng).picture
            return (scenes.pair(first, second[0], rng) if second else scenes.plain(first, rng)).picture

        return [picture(asked) for asked in (*self.twins, *self.recoloured, *self.pairs)]

    @property
    def shown(self) -> list[int]:
        """Which prompts to show people: SHOWN_NAMES names, once each, and SHOWN_COMPOSITIONS of either kind."""
        twins, recoloured, pairs = map(len, (self.twins, self.recoloured, self.pairs))
        first = [*range(0, twins, 2)][:SHOWN_NAMES]
        second = [*range(twins, twins + recoloured)][:SHOWN_COMPOSITIONS]
        return first + second + [*range(twins + recoloured, twins + recoloured + pairs)][:SHOWN_COMPOSITIONS]

    @classmethod
    def of(cls, scenes: Scenes, samples: int) -> Asking:
        """samples: of the names, twice each."""
        rng, seen, held = np.random.default_rng(scenes.held.seed), scenes.seen, scenes.held
        order = rng.permutation(len(seen))
        names = [seen[order[i % len(seen)]].name for i in range(max(1, samples // 2)) for _ in range(2)]
        recolourings = [(c, g.name) for g in seen for c in colours_for(g) if held.composition(c, g.name)]
        tries = ((seen[i].name, seen[j].name) for i, j in rng.integers(len(seen), size=(100 * COMPOSITIONS, 2)))
        pairs = list(dict.fromkeys(pair for pair in tries if held.composition(*pair)))
        chosen = [recolourings[i] for i in rng.permutation(len(recolourings))[:COMPOSITIONS]]
        return cls(
            tuple(Asked(name, (name,)) for name in names),
            tuple(Asked(f"{colour} {name}", (name,), colour) for colour, name in chosen),
            tuple(Asked(f"{left} and {right}", (left, right)) for left, right in pairs[:COMPOSITIONS]),
        )


class GlyphJudge:
    """Measures pictures drawn for ``asking``. scenes: where the glyphs come from; encoder: trained on them."""

    def __init__(self, asking: Asking, scenes: Scenes, encoder: GlyphEncoder) -> None:
        self.asking, self._encoder = asking, encoder
        self._right = as_tensor(asking.drawn(scenes, scenes.held.seed + 1))
        self._places = {glyph.name: place for place, glyph in enumerate(scenes.seen)}
        rng = np.random.default_rng(scenes.held.seed)
        self._references = self._features(as_tensor([scenes.reference(glyph) for glyph in scenes.seen]))
        real = [scenes.plain(scenes.seen[self._places[a.names[0]]], rng).picture for a in asking.twins]
        self._real = self._features(as_tensor(real)).numpy()

    def measure(self, pictures: Tensor) -> dict[str, float]:
        """Every measure of (n, 3, S, S) pictures in -1 … 1, one for each prompt in order."""
        asking, ends = self.asking, np.cumsum([len(self.asking.twins), len(self.asking.recoloured)])
        twins, recoloured, pairs = (torch.as_tensor(part) for part in torch.tensor_split(pictures, ends.tolist()))
        features = self._features(twins)
        ranks = self._ranks(features, [asked.names[0] for asked in asking.twins])
        found = {
            TOP_1: float((ranks < 1).mean()),
            TOP_5: float((ranks < 5).mean()),
            FRECHET: frechet_distance(features.numpy(), self._real),
            DIVERSITY: float((features[::2] - features[1::2]).square().sum(1).mean().sqrt()),
        }
        return {**found, RECOLOURED: self._recoloured(recoloured), PAIRED: self._paired(pairs)}

    def ceiling(self) -> EvaluationRow:
        """The row of the data's own pictures of the prompts: no network's can be expected to be judged better."""
        metrics = {name: Measured.of([value]) for name, value in self.measure(self._right).items()}
        return EvaluationRow(model=DATA, steps=0, evaluations=0, guidance_scale=0, metrics=metrics)

    def _recoloured(self, pictures: Tensor) -> float:
        """Share of right glyphs in the right colour."""
        if not len(pictures):
            return 0.0
        asked = self.asking.recoloured
        right = self._ranks(self._features(pictures), [each.names[0] for each in asked]) < 1
        colours = [colour_of(Image.fromarray(level)) for level in levels(pictures)]
        return float(np.mean([r and c == a.colour for r, c, a in zip(right, colours, asked, strict=True)]))

    def _paired(self, pictures: Tensor) -> float:
        """Share of glyphs that are nearest in their own half."""
        if not len(pictures):
            return 0.0
        middle = pictures.shape[-1] // 2
        right = [
            self._ranks(self._features(_alone(half)), [asked.names[side] for asked in self.asking.pairs]) < 1
            for side, half in enumerate((pictures[..., :middle], pictures[..., middle:]))
        ]
        return float(np.mean(right))

    def _ranks(self, features: Tensor, names: Sequence[str]) -> NDArray[np.int64]:
        """(n,) how many glyphs are nearer than the one asked for."""
        cosines = features @ self._references.T
        own = cosines[torch.arange(len(names)), torch.tensor([self._places[name] for name in names])]
        return np.asarray((cosines > own[:, None]).sum(dim=1))

    @torch.inference_mode()
    def _features(self, pictures: Tensor) -> Tensor:
        return torch.cat([self._encoder.features(part) for part in torch.split(pictures, ENCODED_ROWS)])


def measure_glyphs(
    sampler: LatentSampler,
    everyone: Sequence[Contender],
    judge: GlyphJudge,
    decode: Callable[[Tensor], Tensor],
    show: Callable[[Contender, Tensor], None],
    advance: Callable[[], None],
) -> tuple[EvaluationRow, ...]:
    """The data's row, and one for each contender and guidance scale.

    sampler: with the judge's prompts; decode: latents to pictures; show: given the pictures
    of the first seed at the default guidance.
    """
    rows, settings = [judge.ceiling()], sampler.recipe.evaluation
    for contender in everyone:
        for scale in contender.scales_of(settings):
            found: list[Mapping[str, float]] = []
            for seed in settings.seeds:
                pictures = decode(sampler.draw(contender, scale, seed))
                if seed == settings.seeds[0] and scale == sampler.recipe.served.default:
                    show(contender, pictures)
                found.append(judge.measure(pictures))
                advance()
            rows.append(contender.row(scale, {name: [each[name] for each in found] for name in found[0]}))
    return tuple(rows)


def glyph_gates(rows: Sequence[EvaluationRow], default: float, teacher_steps: int) -> Iterator[Gate]:
    """Four steps obey at the default guidance as the teacher does at its best; distances at every guidance."""
    by_key = {(row.model, row.steps, row.guidance_scale): row for row in rows}
    best = max((row.metrics[TOP_1].mean for row in rows if row.model == TEACHER), default=0.0)
    for model in EXPORTED:
        if (four := by_key.get((model, 4, default))) is None:
            continue
        named = f"4 steps{'' if model == STUDENT else f' of {model}'}, guidance {default:g}: "
        for what, metric, least in (
            ("nearest glyph is the prompted one", TOP_1, LEAST_TOP_1),
            ("prompted glyph among the nearest five", TOP_5, LEAST_TOP_5),
            ("held-out recolourings", RECOLOURED, LEAST_COMPOSED),
            ("held-out pairs", PAIRED, LEAST_COMPOSED),
        ):
            yield Gate(name=named + what, value=four.metrics[metric].mean, limit=least, at_least=True)
        name, ratio = named + "nearest glyph / teacher's best", four.metrics[TOP_1].mean / max(best, 1e-12)
        yield Gate(name=name, value=ratio, limit=LEAST_OF_TEACHERS, at_least=True)
    for row in rows:
        finest = by_key.get((TEACHER, teacher_steps, row.guidance_scale))
        if row.model in EXPORTED and row.steps in DISTANCE_LIMITS and finest is not None:
            ratio = row.metrics[FRECHET].mean / max(finest.metrics[FRECHET].mean, 1e-12)
            name = f"{title(row)} Fréchet distance / teacher's, guidance {row.guidance_scale:g}"
            yield Gate(name=name, value=ratio, limit=DISTANCE_LIMITS[row.steps])


def _alone(half: Tensor) -> Tensor:
    """(n, 3, S, S): halves in the middle of a white picture. half: (n, 3, S, S / 2)."""
    side = half.shape[-2]
    whole = torch.ones(*half.shape[:-1], side)
    first = (side - half.shape[-1]) // 2
    whole[..., first : first + half.shape[-1]] = half
    return whole
