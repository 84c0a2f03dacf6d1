"""The README's pictures of a model, drawn by a server: by steps, by guidance, edits and inpaintings.

Run: python -m tests.benchmarks.pictures [--bundle FOLDER] [--out docs/images]     (`make pictures` does)
Prompts are those that the model itself gives as examples, each with one seed in all rows.
"""

from __future__ import annotations

import base64
import io
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from server.settings import DEFAULT_NAME
from tests.support.serving import serving

COLUMNS = 10
CELL, GAP, LABEL = 64, 8, 130
LETTERS, PROMPT_LINE = 12, 14
"""Most letters, and height, of a line above a column."""
FIRST_SEED = 100
EDIT_STRENGTHS = (0.5, 0.75)
TIMEOUT_S = 300


@dataclass(frozen=True)
class Artist:
    """A model of a running server. about: what /v1/models says of it."""

    client: httpx.Client
    about: dict[str, Any]

    @property
    def prompts(self) -> list[str]:
        return list(self.about["prompts"][:COLUMNS])

    def draw(self, prompt: str, seed: int, **wish: Any) -> Image.Image:
        body = {"model": self.about["id"], "prompt": prompt, "seed": seed, **wish}
        return _picture(self.client.post("/v1/images/generations", json=body))

    def edit(
        self, prompt: str, seed: int, image: Image.Image, mask: Image.Image | None, **wish: Any
    ) -> Image.Image:
        given = {"image": image} if mask is None else {"image": image, "mask": mask}
        files = {name: (f"{name}.png", _png(picture), "image/png") for name, picture in given.items()}
        fields = {"model": self.about["id"], "prompt": prompt, "seed": str(seed)}
        wishes = {name: str(value) for name, value in wish.items()}
        return _picture(self.client.post("/v1/images/edits", data={**fields, **wishes}, files=files))

    def by_steps(self) -> Image.Image:
        rows = [(f"{n} step{'s' if n > 1 else ''}", {"steps": n}) for n in sorted(self.about["steps"]["trained"])]
        return self._sheet(rows[::-1])

    def by_guidance(self) -> Image.Image:
        low, high = (self.about["guidance_scale"][end] for end in ("min", "max"))
        scales = [round(float(scale), 1) for scale in np.geomspace(low, high, 5)]
        return self._sheet([(f"guidance {scale:g}", {"guidance_scale": scale}) for scale in scales])

    def edits(self) -> Image.Image:
        """Each column: a picture, drawn over with the next prompt at some strengths, and its lower half anew."""
        prompts = self.prompts
        seeds = range(FIRST_SEED, FIRST_SEED + len(prompts))
        before = [self.draw(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        asked = list(zip([*prompts[1:], prompts[0]], seeds, before, strict=True))
        rows = [("drawn", before)]
        for strength in EDIT_STRENGTHS:
            edited = [self.edit(prompt, seed, image, None, strength=strength) for prompt, seed, image in asked]
            rows.append((f"as its neighbour,\nstrength {strength:g}", edited))
        mask = _lower_half(before[0].size)
        rows.append(("its lower half,\ninpainted", [self.edit(*each, mask) for each in asked]))
        return sheet(prompts, rows)

    def _sheet(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> Image.Image:
        return sheet(
            self.prompts,
            [
                (label, [self.draw(prompt, FIRST_SEED + i, **wish) for i, prompt in enumerate(self.prompts)])
                for label, wish in rows
            ],
        )


def sheet(prompts: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Labelled rows of pictures, a prompt above each column."""
    told = ["\n".join(textwrap.wrap(prompt, LETTERS)) for prompt in prompts]
    head = GAP + PROMPT_LINE * max(words.count("\n") + 1 for words in told)
    width, height = LABEL + len(told) * (CELL + GAP) + GAP, head + len(rows) * (CELL + GAP) + GAP
    page = Image.new("RGB", (width, height), "white")
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(14), ImageFont.load_default(11)
    for c, words in enumerate(told):
        middle = LABEL + c * (CELL + GAP) + CELL // 2
        pen.multiline_text((middle, head), words, fill="gray", font=small, anchor="md", align="center", spacing=2)
    for r, (label, row) in enumerate(rows):
        top = head + GAP + r * (CELL + GAP)
        pen.multiline_text((GAP, top + CELL // 2), label, fill="black", font=font, anchor="lm")
        for c, picture in enumerate(row):
            page.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (LABEL + c * (CELL + GAP), top))
    return page


def _picture(answer: httpx.Response) -> Image.Image:
    if answer.status_code != httpx.codes.OK:
        raise SystemExit(f"the server refused a picture: {answer.text}")
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).convert("RGB")


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _lower_half(size: tuple[int, int]) -> Image.Image:
    """A mask whose lower half is transparent."""
    mask = Image.new("RGBA", size, "white")
    mask.paste((0, 0, 0, 0), (0, size[1] // 2, *size))
    return mask


def main(bundle: Path = Path(DEFAULT_NAME), out: Path = Path("docs/images")) -> None:
    """Write MODEL-steps.png, MODEL-guidance.png and MODEL-edits.png."""
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.NamedTemporaryFile() as log,
        serving([bundle], log=Path(log.name)) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        artist = Artist(client, client.get("/v1/models").json()["data"][0])
        pictures = {"steps": artist.by_steps, "guidance": artist.by_guidance, "edits": artist.edits}
        for name, drawn in pictures.items():
            drawn().save(out / f"{artist.about['id']}-{name}.png")


if __name__ == "__main__":
    typer.run(main)
