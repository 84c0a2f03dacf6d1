"""The README's pictures, drawn by a running server: every digit by steps and by guidance, one seed a column.

Run: python -m server serve, then python -m tests.benchmarks.pictures [--url http://127.0.0.1:8000]
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import typer
from PIL import Image, ImageDraw, ImageFont

FOLDER = Path("docs/images")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELL, GAP, LABEL = 64, 8, 130


def draw(client: httpx.Client, prompt: str, steps: int, guidance_scale: float, seed: int) -> Image.Image:
    body = {"prompt": prompt, "steps": steps, "guidance_scale": guidance_scale, "seed": seed}
    answer = client.post("/v1/images/generations", json=body).raise_for_status().json()
    return Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))


def sheet(client: httpx.Client, rows: list[tuple[str, int, float]]) -> Image.Image:
    """One labelled row for each (label, steps, guidance_scale), one column a digit."""
    size = (LABEL + len(WORDS) * (CELL + GAP) + GAP, len(rows) * (CELL + GAP) + GAP)
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for r, (label, steps, guidance_scale) in enumerate(rows):
        top = GAP + r * (CELL + GAP)
        pen.text((GAP, top + CELL // 2), label, fill="black", font=font, anchor="lm")
        for c, word in enumerate(WORDS):
            image = draw(client, word, steps, guidance_scale, seed=100 + c)
            page.paste(image.resize((CELL, CELL), Image.Resampling.NEAREST), (LABEL + c * (CELL + GAP), top))
    return page


def main(url: str = "http://127.0.0.1:8000") -> None:
    """url: a server with the embedded digits model."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with httpx.Client(base_url=url, timeout=30) as client:
        by_steps = [(f"{n} step{'s' if n > 1 else ''}", n, 2.0) for n in (8, 4, 2, 1)]
        sheet(client, by_steps).save(FOLDER / "digits-steps.png")
        by_guidance = [(f"guidance {s:g}", 4, s) for s in (1.0, 2.0, 3.0, 4.0, 5.0)]
        sheet(client, by_guidance).save(FOLDER / "digits-guidance.png")


if __name__ == "__main__":
    typer.run(main)
