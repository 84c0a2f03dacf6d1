"""The report's tables of the tasks: what stands above each, and its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.manifest import EvaluationRow


@dataclass(frozen=True)
class TaskTable:
    """title, text: above the table; columns: headings by metric."""

    title: str
    text: str
    columns: Mapping[str, str]


TABLES = {
    "decoder": TaskTable(
        "Decoder",
        "The same latents, drawn at the default guidance, decoded by the teacher's autoencoder and by the tiny "
        "one. PSNR, in dB, and relative error (root mean square difference over root mean square) are against the "
        "autoencoder's own pictures, of values in -1 … 1; PSNR of the data is of its pictures, given back from "
        "their latents; the glyphs' measures, where a run has them, are those of their table.",
        {
            "decoder_psnr": "PSNR",
            "decoder_error": "relative error",
            "decoder_data_psnr": "PSNR of the data",
            "glyph_top_1": "top 1",
            "glyph_top_5": "top 5",
            "frechet_distance": "Fréchet distance",
        },
    ),
    "glyphs": TaskTable(
        "Glyphs",
        "Pictures drawn for the names of glyphs, each twice; the nearest glyph is looked for in the features of an "
        "image encoder that the recipe trains on the glyphs. Top 1, top 5: share of pictures to which the prompted "
        "glyph is the nearest, or among the nearest five. Fréchet distance, in those features, to real pictures of "
        "the same glyphs. Diversity: RMS distance of the two pictures of a name. Recoloured: held-out glyphs in a "
        "colour, share of the right one in the right colour; pairs: held-out, share of right glyphs in their half. "
        "The data's row is of its own pictures for the same prompts: what the encoder makes of right ones.",
        {
            "glyph_top_1": "top 1",
            "glyph_top_5": "top 5",
            "frechet_distance": "Fréchet distance",
            "glyph_diversity": "diversity",
            "recoloured_agreement": "recoloured",
            "pair_agreement": "pairs",
        },
    ),
    "inpainting": TaskTable(
        "Inpainting",
        "Real digits of which one half (upper, lower, left and right in turn) is hidden and drawn anew as their "
        "own class; the other half is put back as it was. Agreement: share that the classifier takes for that "
        "class; beside it that of images the same student draws from text alone, and that of the digits before, "
        "grey where they are hidden. Blended: what is known is noised and put back after every step.",
        {
            "inpaint_agreement": "agreement",
            "text_agreement": "from text alone",
            "hidden_agreement": "before",
        },
    ),
    "latent_inpainting": TaskTable(
        "Inpainting",
        "Images of the data of which one half (upper, lower, left and right in turn) is hidden and drawn anew "
        "under their own caption. Root mean square differences of the final latents, before known pixels are put "
        "back over the image: within the mask to those of the teacher's finest, outside it to the image's own. "
        "Blended: what is known is noised and put back after every step, and the network sees none of it.",
        {"masked_distance": "distance to the teacher within the mask", "known_distance": "to the image outside it"},
    ),
    "latent_inversion": TaskTable(
        "Inversion",
        "Images of the data, encoded to their noise under their own caption with guidance off, and decoded the "
        "same way in as many steps. Reconstruction error: root mean square difference of latents; evaluations are "
        "of both ways.",
        {"reconstruction_error": "reconstruction error"},
    ),
    "inversion": TaskTable(
        "Inversion",
        "Real digits, encoded to its noise under its own class with guidance off, in as many steps as it is "
        "decoded in. Reconstruction error: RMS pixel difference, in the range -1 … 1, when one is decoded the same "
        "way; evaluations are of both ways. Edits are decoded as another class at the guidance_scale shown: "
        "agreement is the share that the classifier takes for it, change the RMS difference from the image.",
        {
            "reconstruction_error": "reconstruction error",
            "edit_agreement": "agreement of edits",
            "edit_distance": "change by edits",
        },
    ),
}


def task_lines(tables: Mapping[str, Sequence[EvaluationRow]]) -> list[str]:
    """Markdown of every task's table."""
    return [line for name, rows in tables.items() for line in _lines(TABLES[name], rows)]


def _lines(table: TaskTable, rows: Sequence[EvaluationRow]) -> list[str]:
    columns = {name: heading for name, heading in table.columns.items() if any(name in row.metrics for row in rows)}
    lines = [
        *(f"## {table.title}", "", table.text, ""),
        f"| guidance_scale | model | steps | evaluations | {' | '.join(columns.values())} |",
        f"|---:|---|---:|---:|{'---:|' * len(columns)}",
    ]
    for row in rows:
        cells = (f"{row.metrics[name].mean:.3f}" if name in row.metrics else "–" for name in columns)
        model = row.model if row.sampler == "deterministic" else f"{row.model}, {row.sampler}"
        made = (f"{row.guidance_scale:g}", model, str(row.steps), str(row.evaluations))
        head = f"| {' | '.join(made if row.steps else ('–', model, '–', '–'))} |"
        lines.append(f"{head} {' | '.join(cells)} |")
    return [*lines, ""]
