"""From a font to a served model: a pipeline made of glyphs, distilled into one network, exported, asked."""

from __future__ import annotations

import base64
import io
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import torch
import yaml
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

from distill_jobs import glyph_encoder, stage_one
from distill_jobs.card import filled
from distill_jobs.cli import app
from distill_jobs.contenders import Contender
from distill_jobs.data import drawing
from distill_jobs.data.captioned import index_shards
from distill_jobs.errors import JobError, RecipeError
from distill_jobs.export import evaluation_of, export_run
from distill_jobs.half_weights import LEAST_NUMBERS
from distill_jobs.intervals import interval_teachers, measure_intervals
from distill_jobs.job import run_job
from distill_jobs.onnx_export import ExportError
from distill_jobs.pipelines.decoders import DECODER
from distill_jobs.pipelines.evaluate import evaluate_latent_run
from distill_jobs.pipelines.glyphs import GLYPHS
from distill_jobs.pipelines.report import LatentReport
from distill_jobs.plan import plan_of
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder, training_seconds
from distill_jobs.student import weights_sha256
from distill_jobs.taken import take_phases, takeable
from engines import cli as engines_cli
from engines.bundle import verify_bundle
from engines.noise import Purpose, row_noise
from engines.open import open_pipeline
from tests.benchmarks.pictures import CELL, GAP, LABEL, PROMPT_LINE, Artist
from tests.support.glyphs import glyphs
from tests.support.serving import ServerProcess, serving

SIDE = 16
SIZES = ("16x16", "24x16")
PROMPTS = ["cherry 0", "red lemon 1"]
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "mid_block_type": None,
    "norm_num_groups": 4,
}
ROWS = {"updates": 2, "batch_size": 4, "ema": 0.5}
LEARNING = {"updates": 15, "batch_size": 8, "ema": 0.5, "lr": 0.02, "warmup": 0}
"""Enough for words and guidance to matter."""
SMALL: dict[str, Any] = {
    "base": "emoji",
    "unet": UNET,
    "teacher": {
        **LEARNING,
        "autoencoder": {**ROWS, "block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4},
        "text": {"words": 600, "tokens": 16, "width": 16, "layers": 1, "heads": 2, "training": LEARNING},
        "finetune": {**LEARNING, "updates": 4, "pictures": 20, "shares": {"plain": 0.2}},
    },
    "stage_one": {**LEARNING, "max_relative_error": 10},
    "stage_two": {"batch_size": 4, "halvings": [{"steps": n, "updates": 1} for n in (8, 4, 2, 1)]},
    "evaluation": {
        "samples": 20,
        "seeds": [1],
        "guidance_scales": [1.0, 4.0],
        "teacher_steps": 8,
        "batch_size": 60,
    },
    "decoder": {"updates": 40, "batch_size": 8, "lr": 0.01, "warmup": 0, "width": 8, "blocks": 1},
    "export": {"prompts": PROMPTS},
}
QUIET = Progress(disable=True)


def small_recipe(work: Path, **data: Any) -> Path:
    """The shipped recipe, made so small that it takes seconds, and without a font."""
    for name in ("font", "names"):
        (work / name).write_text(name)
    told = {name: str(work / name) for name in ("font", "names", "cache")}
    drawn = {"path": str(work / "drawn"), "pictures": 30, "side_px": SIDE, **told, **data}
    (work / "recipe.yaml").write_text(yaml.safe_dump({**SMALL, "data": drawn}))
    return work / "recipe.yaml"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("glyphs")
    short = glyph_encoder.TRAINING.model_copy(update={"updates": 2, "batch_size": 4, "warmup": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "read_names", lambda file: ())
        patch.setattr(drawing, "read_glyphs", lambda font, names: glyphs(8))
        patch.setattr(stage_one, "GATE_ROWS", 8)
        patch.setattr(glyph_encoder, "TRAINING", short)
        recipe = read_recipe(small_recipe(work))
        run_job(recipe, work / "run", resume=False, progress=QUIET)
        evaluate_latent_run(work / "run", recipe, progress=QUIET)
        export_run(work / "run", work / "bundle", recipe, despite_gates=True, decoder="tiny", sizes=SIZES)
    return work


def test_the_report_has_a_table_of_glyphs(work: Path) -> None:
    report = LatentReport.read(work / "run")
    models = {(row.model, row.steps) for row in report.tasks[GLYPHS]}
    students = {("student", n) for n in (8, 4, 2, 1)}
    assert models == {("data", 0)} | {("teacher", n) for n in (8, 6, 4, 3, 2, 1)} | students
    assert "## Glyphs" in report.markdown()
    for shown in ("teacher-8", "student-4", "student-1"):
        assert (work / "run" / "sheets" / f"glyphs-{shown}.png").is_file()
    prompts = (work / "run" / "sheets" / "glyphs.txt").read_text().splitlines()
    assert len(prompts) > 4
    with Image.open(work / "bundle" / "samples.png") as sheet:
        assert sheet.width > 4 * 3 * SIDE
        assert sheet.height > len(prompts) / 4 * SIDE


def test_what_was_drawn_is_not_drawn_again(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, again, drawn = read_recipe(work / "run" / "recipe.yaml"), tmp_path / "run", list[str]()
    draw = Contender.draw

    def watched(self: Contender, *rest: Any) -> torch.Tensor:
        drawn.append(self.key)
        return draw(self, *rest)

    monkeypatch.setattr(drawing, "read_names", lambda file: ())
    monkeypatch.setattr(drawing, "read_glyphs", lambda font, names: glyphs(8))
    monkeypatch.setattr(Contender, "draw", watched)
    shutil.copytree(work / "run", again)
    [spoilt, *_] = sorted((again / "evaluation").glob("*/student-4-g*/latents.safetensors"))
    spoilt.write_bytes(b"half a file")
    first, second = LatentReport.read(again), evaluate_latent_run(again, recipe, progress=QUIET)
    assert set(drawn) == {"student-4"}
    drawn.clear()
    kept = {file: file.read_bytes() for file in (work / "run" / "evaluation").rglob("*.safetensors")}
    for gone in ("evaluation", "glyph_encoder"):
        shutil.rmtree(again / gone)
    third = evaluate_latent_run(again, recipe, progress=QUIET, lenders=[work / "run"])
    assert drawn == []
    assert {file: file.read_bytes() for file in (work / "run" / "evaluation").rglob("*.safetensors")} == kept
    for report in (second, third):
        assert report.evaluation == first.evaluation
        assert report.tasks == first.tasks
    evaluate_latent_run(again, recipe.model_copy(update={"clip": 1.0}), progress=QUIET)
    assert {"teacher-8", "student-4"} <= set(drawn)


def test_a_teacher_guided_in_intervals_has_a_table_of_glyphs(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "read_names", lambda file: ())
    monkeypatch.setattr(drawing, "read_glyphs", lambda font, names: glyphs(8))
    shutil.copytree(work / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "students")
    teachers = interval_teachers(RunFolder(tmp_path / "run"), [-2.0], [0.5, 1.5], 8)
    report = measure_intervals(tmp_path / "run", teachers, progress=QUIET)
    told = [(row.model, row.guidance_scale, row.evaluations) for row in report.rows]
    where = [f"guided from log-SNR -2 to {high}" for high in (0.5, 1.5)]
    assert told == [("data", 0, 0), ("guided everywhere", 4, 16), (where[0], 4, 11), (where[1], 4, 12)]
    assert all("recoloured_agreement" in row.metrics for row in report.rows)
    assert report.samples == LatentReport.read(work / "run").evaluation.samples > 20
    assert "## Glyphs" in report.markdown()


def test_every_graph_of_the_bundle_keeps_its_weights_in_half(work: Path) -> None:
    manifest = verify_bundle(work / "bundle").manifest
    assert manifest.graphs.keys() >= {"condition", "decode", "encode", "step"}
    halved = set()
    for name, graph in manifest.graphs.items():
        assert graph.rounded is not None, name
        tensors = onnx.load(str(work / "bundle" / graph.file)).graph.initializer
        halved |= {name for t in tensors if t.data_type == onnx.TensorProto.FLOAT16}
        assert all(math.prod(t.dims) >= LEAST_NUMBERS for t in tensors if t.data_type == onnx.TensorProto.FLOAT16)
    assert "step" in halved
    told = CliRunner().invoke(engines_cli.app, ["verify", str(work / "bundle")]).stdout
    assert re.search(r"weights: rounded to float16, which moved outputs by at most: condition \d", told)


def test_a_bundle_is_packed_otherwise_without_a_new_evaluation(work: Path) -> None:
    recipe = read_recipe(work / "run" / "recipe.yaml")
    packed = recipe.model_copy(update={"export": recipe.export.model_copy(update={"weights": "float32"})})
    assert evaluation_of(work / "run", packed).weights
    other = recipe.model_copy(update={"export": recipe.export.model_copy(update={"default_steps": 1})})
    with pytest.raises(ExportError, match="of the recipe as it was before"):
        evaluation_of(work / "run", other)


def test_the_report_has_rows_of_both_decoders(work: Path) -> None:
    report = LatentReport.read(work / "run")
    rows = {row.model: row for row in report.tasks[DECODER]}
    assert set(rows) == {"teacher", "teacher, tiny decoder", "student", "student, tiny decoder"}
    assert {row.steps for row in rows.values()} == {8, 4}
    full, tiny = rows["student"].metrics, rows["student, tiny decoder"].metrics
    assert full["decoder_error"].mean == 0
    assert "decoder_psnr" not in full
    assert tiny["decoder_error"].mean > 0
    assert full["decoder_data_psnr"] == rows["teacher"].metrics["decoder_data_psnr"] != tiny["decoder_data_psnr"]
    for metric in ("glyph_top_1", "glyph_top_5", "frechet_distance"):
        assert metric in full
        assert metric in tiny
    assert full["frechet_distance"] != tiny["frechet_distance"]
    assert {gate.name.split(",")[0] for gate in report.gates} >= {"tiny decoder"}
    [full_row] = [line for line in report.markdown().splitlines() if line.startswith("| 4 | student | 4 | 4 | – |")]
    assert "0.000" in full_row
    assert "decoder" in report.weights


def test_the_network_is_fine_tuned_on_pictures_of_its_own(work: Path) -> None:
    run = RunFolder(work / "run")
    for part in ("vae", "text_encoder", "tokenizer"):
        for file in (run.begun / part).iterdir():
            assert (run.teacher / part / file.name).read_bytes() == file.read_bytes()
    assert weights_sha256(run.begun) != weights_sha256(run.teacher)
    assert str(work) not in (run.teacher / "unet" / "config.json").read_text()
    assert training_seconds(run).keys() >= {"teacher", "finetune"}
    drawn = {len(index_shards(str(folder))) for folder in (work / "drawn").iterdir()}
    assert drawn == {30, 20}


def test_a_resume_within_the_fine_tuning_is_of_the_same_pictures(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = read_recipe(work / "run" / "recipe.yaml"), RunFolder(tmp_path / "run")
    shutil.copytree(work / "run", run.path)
    shutil.rmtree(run.teacher)
    run.data.unlink()
    monkeypatch.setattr(drawing, "read_names", lambda file: ())
    monkeypatch.setattr(drawing, "read_glyphs", lambda font, names: glyphs(7))
    (work / "font").write_text("another font")
    with pytest.raises(RecipeError, match="not those that"):
        run_job(recipe, run.path, resume=True, progress=QUIET)
    (work / "font").write_text("font")


def test_who_takes_the_fine_tuned_teacher_needs_none_before_it(work: Path, tmp_path: Path) -> None:
    recipe, run = read_recipe(work / "run" / "recipe.yaml"), RunFolder(tmp_path / "run")
    shutil.copytree(work / "run", run.path)
    shutil.rmtree(run.begun)
    told = takeable(recipe, run)
    assert told.names >= {"teacher", "finetune", "stage_one", "d1"}
    assert not told.refused
    assert [phase.name for phase in plan_of(recipe).phases[2:4]] == ["teacher", "finetune"]
    before = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"finetune": None})})
    said = dict(takeable(before, run).refused)
    assert said["teacher"] == "not finished there"
    older = RunFolder(tmp_path / "older")
    shutil.copytree(run.path, older.path)
    older.recipe.write_text(before.to_yaml(), encoding="utf-8")
    mine = RunFolder(tmp_path / "mine")
    list(take_phases(recipe, older, mine))  # its teacher is where this recipe's begins
    assert weights_sha256(mine.begun) == weights_sha256(older.teacher)
    assert not mine.teacher.exists()


def test_pictures_of_another_side_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.side_px is 32; .* make pictures of 16"):
        read_recipe(small_recipe(tmp_path, side_px=32))


def test_the_bundle_tells_how_it_was_made(work: Path) -> None:
    manifest = verify_bundle(work / "bundle").manifest
    assert [student.steps for student in manifest.students] == [8, 4, 2, 1]
    assert {student.graph for student in manifest.students} == {"step"}
    assert set(manifest.graphs) == {"condition", "decode", "encode", "step"}
    assert "SIL OFL" in manifest.licences.data
    assert yaml.safe_load(manifest.recipe.text)["seed"] == 0
    report = LatentReport.read(work / "run")
    assert manifest.evaluation == report.evaluation
    assert {"glyph_top_1", "glyph_top_5"} <= manifest.tables[GLYPHS][0].metrics.keys()
    assert manifest.tables == report.tasks
    assert manifest.decoder == "tiny"
    assert manifest.condition.examples == tuple(PROMPTS)
    assert tuple(map(str, manifest.sizes)) == SIZES
    for name in ("decode", "encode", "step"):
        assert set(manifest.graphs[name].parity_by_size) == set(SIZES)
    assert manifest.graphs["condition"].parity_by_size == {}


def test_the_engine_draws_at_each_size_what_diffusers_draws_with_the_folded_student_and_the_tiny_decoder(
    work: Path,
) -> None:
    stock = StableDiffusionPipeline.from_pretrained(work / "run" / "students" / "d4", use_safetensors=True)
    stock.vae = AutoencoderTiny.from_pretrained(work / "run" / "decoder", use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    pipeline = open_pipeline(work / "bundle", "onnxruntime", rungs=(1, 2), warm=False)
    told = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
    for size in pipeline.manifest.sizes:
        noise = row_noise(3, (4, size.latent_height, size.latent_width), Purpose.INITIAL)
        framed = {"height": size.height, "width": size.width, "latents": torch.from_numpy(noise)[None]}
        expected = stock(PROMPTS[1], **told, **framed).images[0] * 255
        drawn = pipeline.generate(PROMPTS, 4.0, [4, 3], steps=4, size=size)[1]
        assert drawn.shape == (size.height, size.width, 3)
        assert np.abs(drawn - expected).max() <= 1.0


def test_the_card_begins_as_the_recipes_and_keeps_what_people_wrote(work: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "card.md"
    command = ["card", str(work / "run"), str(page)]
    assert CliRunner().invoke(app, command).exit_code == 0
    page.write_text(page.read_text().replace("## Limits\n", "## Limits\n\n- It knows 8 glyphs.\n"))
    assert CliRunner().invoke(app, command).exit_code == 0
    written = page.read_text()
    assert written.count("- It knows 8 glyphs.") == 1
    assert written.count("| 4 | student | 4 | 4 |") == 3  # distance to the teacher, glyphs, decoder
    assert "| target | value | limit | |" in written
    assert "| parameters of text_encoder |" in written
    assert (page.parent / "images" / "emoji-prompts.png").is_file()


def test_a_cards_marks_are_ours() -> None:
    with pytest.raises(JobError, match="'report: colour' is none of: quality"):
        filled("<!-- report: colour -->\n<!-- end -->", {"quality": str})
    with pytest.raises(JobError, match="no place"):
        filled("# Card", {"quality": str})


@pytest.fixture(scope="module")
def server(work: Path) -> Iterator[ServerProcess]:
    with serving([work / "bundle"], log=work / "log") as server:
        yield server


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(answer: httpx.Response) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]


def test_it_draws_edits_and_inpaints_over_http(server: ServerProcess) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((SIDE, SIDE, 4), np.uint8)
    mask[:8, :, 3] = 255
    with httpx.Client(base_url=server.url, timeout=300) as client:

        def drawn(**wish: Any) -> np.ndarray:
            wish = {"prompt": "cherry 0", "seed": 3, "guidance_scale": 4.0, **wish}
            [picture] = pictures(client.post("/v1/images/generations", json=wish))
            return picture

        def edited(files: dict[str, bytes], **fields: str) -> np.ndarray:
            sent = {name: (f"{name}.png", data, "image/png") for name, data in files.items()}
            data = {"prompt": "red lemon 1", "seed": "3", **fields}
            [picture] = pictures(client.post("/v1/images/edits", data=data, files=sent))
            return picture

        [about] = client.get("/v1/models").json()["data"]
        by_steps = [drawn(steps=steps) for steps in (1, 2, 4, 8)]
        swept = [drawn(guidance_scale=scale) for scale in (1.0, 9.0)]
        wide = drawn(size=SIZES[1])
        weak, strong = (edited({"image": png(photo)}, strength=strength) for strength in ("0.25", "1.0"))
        inpainted = edited({"image": png(photo), "mask": png(mask)})
        wrong = [{"steps": 3}, {"size": "24x24"}]
        refused = [client.post("/v1/images/generations", json={"prompt": "cherry", **each}) for each in wrong]
    assert (about["id"], about["prompts"], about["steps"]["trained"]) == ("emoji", PROMPTS, [1, 2, 4, 8])
    assert all(picture.shape == (SIDE, SIDE, 3) for picture in by_steps)
    assert len({picture.tobytes() for picture in (*by_steps, *swept)}) == 6
    assert not np.array_equal(weak, strong)
    np.testing.assert_array_equal(inpainted[:8], photo[:8])
    assert not np.array_equal(inpainted[8:], photo[8:])
    assert (wide.shape, about["sizes"]) == ((16, 24, 3), list(SIZES))
    for answer, param in zip(refused, ("steps", "size"), strict=True):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_its_pictures_are_drawn_by_the_server(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, timeout=300) as client:
        artist = Artist(client, client.get("/v1/models").json()["data"][0])
        sheets = [artist.by_steps(), artist.by_guidance(), artist.edits()]
    width = LABEL + len(PROMPTS) * (CELL + GAP) + GAP
    [head] = {sheet.height - rows * (CELL + GAP) - GAP for sheet, rows in zip(sheets, (4, 5, 4), strict=True)}
    assert head > PROMPT_LINE
    assert [sheet.width for sheet in sheets] == [width] * 3
    tops = [head + GAP, head + GAP + 2 * (CELL + GAP)]
    first, second = (np.asarray(sheets[0].crop((LABEL, top, width, top + CELL))) for top in tops)
    assert not np.array_equal(first, second)
