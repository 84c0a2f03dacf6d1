"""The ``generate`` command: flags to a wish, files on disk, progress in between."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from engines.errors import HalfstepError
from server.settings import DEFAULT_BUNDLE, DEFAULT_NAME
from server.wish import FORMATS, GenerateError, Wish

_err = Console(stderr=True, highlight=False, soft_wrap=True)
_out = Console(highlight=False, soft_wrap=True)

Prompt = Annotated[str, typer.Argument(help="What to draw.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write: .png, .jpg or .webp.")]
Url = Annotated[str | None, typer.Option("--url", help="A running server; else the model runs in this process.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="Key of that server.")]
Bundle = Annotated[
    Path, typer.Option("--bundle", help="Folder of the model to run here.", show_default=DEFAULT_NAME)
]
Model = Annotated[str | None, typer.Option("--model", help="Model of that server.")]
Images = Annotated[int, typer.Option("-n", help="Images, each with its own seed.", min=1, max=10)]
Guidance = Annotated[float | None, typer.Option("--guidance-scale", help="Strength of the prompt; 1 is off.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps the model was made for.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the first image; random when left out.")]
Image = Annotated[Path | None, typer.Option("--image", help="Image to edit.")]
Mask = Annotated[Path | None, typer.Option("--mask", help="PNG; where it is transparent is drawn anew.")]
Strength = Annotated[float | None, typer.Option("--strength", help="How much of the image may change, 0 to 1.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]


def generate(
    prompt: Prompt,
    output: Output = Path("image.png"),
    url: Url = None,
    api_key: ApiKey = None,
    bundle: Bundle = DEFAULT_BUNDLE,
    model: Model = None,
    n: Images = 1,
    guidance_scale: Guidance = None,
    steps: Steps = None,
    seed: Seed = None,
    image: Image = None,
    mask: Mask = None,
    strength: Strength = None,
    force: Force = False,
) -> None:
    """Draw a prompt to a file; several images get their seeds into their names."""
    fields = {"prompt": prompt, "model": model, "n": n, "guidance_scale": guidance_scale, "steps": steps}
    fields |= {"seed": seed, "strength": strength}
    try:
        wish = _wish(fields, image, mask, output)
        if n == 1:
            _check_free([output], force)
        drawn = _drawn(wish, url, api_key, bundle)
        _save(drawn, output, force, single=n == 1)
        if withheld := n - len(drawn):
            _err.print(f"The server's safety check withheld {withheld} of {n} images.")
    except (HalfstepError, OSError) as error:
        _err.print(f"Error: {error}", markup=False)
        raise typer.Exit(1) from None


def _wish(fields: dict[str, Any], image: Path | None, mask: Path | None, output: Path) -> Wish:
    """fields: of the API's body, None for those left to the model."""
    image_format = FORMATS.get(output.suffix.lower())
    if image_format is None:
        raise GenerateError(f"{output} must end in {', '.join(FORMATS)}")
    given = {name: value for name, value in fields.items() if value is not None}
    if (mask or "strength" in given) and image is None:
        raise GenerateError("--mask and --strength belong to an edit; name its image with --image")
    return Wish({"output_format": image_format, **given}, image, mask)


def _drawn(wish: Wish, url: str | None, api_key: str | None, bundle: Path) -> list[tuple[int, bytes]]:
    """(seed, file) of each image that was not withheld, made while a bar tells how far it is."""
    from server.generate import draw_here, draw_there  # noqa: PLC0415 - so that --help answers at once

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as progress:
        task = progress.add_task("Loading the model" if url is None else f"Waiting for {url}", total=None)
        unit = "Steps" if url is None else "Images"

        def told(done: int, of: int) -> None:
            progress.update(task, description=unit, completed=done, total=of)

        return draw_here(bundle, wish, told) if url is None else draw_there(url, api_key, wish, told)


def _save(images: list[tuple[int, bytes]], output: Path, force: bool, *, single: bool) -> None:
    paths = [output if single else output.with_stem(f"{output.stem}-{seed}") for seed, _ in images]
    _check_free(paths, force)
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, (seed, data) in zip(paths, images, strict=True):
        path.write_bytes(data)
        _out.print(f"{path}  seed {seed}", markup=False)


def _check_free(paths: list[Path], force: bool) -> None:
    for path in paths:
        if path.exists() and not force:
            raise GenerateError(f"{path} exists; choose another --output, or add --force")
