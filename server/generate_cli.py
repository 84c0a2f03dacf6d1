"""The ``generate`` command: flags to a wish, files on disk, progress in between."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from engines.errors import HalfstepError
from server.settings import DEFAULT_BUNDLE

_err = Console(stderr=True, highlight=False, soft_wrap=True)
_out = Console(highlight=False, soft_wrap=True)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .png, .jpg or .webp.")] = Path(
        "image.png"
    ),
    url: Annotated[
        str | None, typer.Option("--url", help="A running server; else the model runs in this process.")
    ] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help="Key of that server.")] = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="Model of this process.", show_default="server/bundles/default"),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model of that server.")] = None,
    n: Annotated[int, typer.Option("-n", help="Images, each with its own seed.", min=1, max=10)] = 1,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", help="Strength of the prompt; 1 is off.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps the model was made for.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the first image; random when left out.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Image to edit.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="PNG; where it is transparent is drawn anew.")] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="How much of the image may change, 0 to 1.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Draw a prompt to a file; several images get their seeds into their names."""
    from server.generate import FORMATS, GenerateError, Wish, draw_here, draw_there  # noqa: PLC0415 - for --help

    try:
        if output.suffix.lower() not in FORMATS:
            raise GenerateError(f"{output} must end in {', '.join(FORMATS)}")
        if (mask or strength is not None) and image is None:
            raise GenerateError("--mask and --strength belong to an edit; name its image with --image")
        given = {
            "model": model,
            "n": n,
            "guidance_scale": guidance_scale,
            "steps": steps,
            "seed": seed,
            "strength": strength,
        }
        fields = {name: value for name, value in given.items() if value is not None}
        wish = Wish({"prompt": prompt, "output_format": FORMATS[output.suffix.lower()], **fields}, image, mask)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, console=_err, transient=True) as progress:
            task = progress.add_task("Loading the model" if url is None else f"Waiting for {url}", total=None)

            def told(done: int, of: int) -> None:
                unit = "Steps" if url is None else "Images"
                progress.update(task, description=unit, completed=done, total=of)

            if url is None:
                made = draw_here(bundle or DEFAULT_BUNDLE, wish, told)
            else:
                made = draw_there(url, api_key, wish, told)
        for number, data in made:
            path = output if len(made) == 1 else output.with_stem(f"{output.stem}-{number}")
            if path.exists() and not force:
                raise GenerateError(f"{path} exists; choose another --output, or add --force")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            _out.print(f"{path}  seed {number}", markup=False)
    except (HalfstepError, OSError) as error:
        _err.print(f"Error: {error}", markup=False)
        raise typer.Exit(1) from None
