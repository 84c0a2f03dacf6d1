"""A bundle that is not exactly what its manifest says is refused, with a sentence that names the trouble."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engines.bundle import MAX_MANIFEST_BYTES, Bundle, file_records, verify_bundle
from engines.errors import BundleError
from engines.manifest import MANIFEST_NAME, SEAL_NAME

Change = Callable[[Path], None]


@pytest.fixture
def copy(toy: Bundle, tmp_path: Path) -> Path:
    """A copy of the toy bundle to spoil."""
    return Path(shutil.copytree(toy.path, tmp_path / "copy"))


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / MANIFEST_NAME
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")
    seal(path)


def seal(path: Path) -> None:
    """Make the seal fit whatever the manifest has become, so that the checks behind it are reached."""
    digest = hashlib.sha256((path / MANIFEST_NAME).read_bytes()).hexdigest()
    (path / SEAL_NAME).write_text(f"{digest}\n", encoding="utf-8")


def relist(path: Path) -> None:
    """Make the manifest's hashes and sizes right again, as an attacker who can write the manifest would."""
    records = {name: record.model_dump() for name, record in file_records(path).items()}
    edit_manifest(path, lambda data: data.update(files=records))


def rename_file(data: dict[str, Any], old: str, new: str) -> None:
    data["files"][new] = data["files"].pop(old)


def extra_file(path: Path) -> None:
    (path / "notes.txt").write_text("hello", encoding="utf-8")


def missing_file(path: Path) -> None:
    (path / "decode.onnx").unlink()


def symlinked_file(path: Path) -> None:
    outside = path.parent / "outside.onnx"
    (path / "decode.onnx").rename(outside)
    (path / "decode.onnx").symlink_to(outside)


def symlinked_folder(path: Path) -> None:
    (path / "more").symlink_to(path.parent, target_is_directory=True)


def symlinked_manifest(path: Path) -> None:
    outside = path.parent / "outside.json"
    (path / MANIFEST_NAME).rename(outside)
    (path / MANIFEST_NAME).symlink_to(outside)


def parent_path(path: Path) -> None:
    edit_manifest(path, lambda data: rename_file(data, "decode.onnx", "../decode.onnx"))


def absolute_path(path: Path) -> None:
    edit_manifest(path, lambda data: rename_file(data, "decode.onnx", "/etc/passwd"))


def backslash_path(path: Path) -> None:
    edit_manifest(path, lambda data: rename_file(data, "decode.onnx", "..\\decode.onnx"))


def executable_file(path: Path) -> None:
    (path / "weights.pkl").write_bytes(b"\x80\x04.")
    relist(path)


def swapped_graphs(path: Path) -> None:
    (path / "decode.onnx").rename(path / "swap.onnx")
    (path / "condition.onnx").rename(path / "decode.onnx")
    (path / "swap.onnx").rename(path / "condition.onnx")


def swapped_and_relisted(path: Path) -> None:
    swapped_graphs(path)
    relist(path)


def external_data_outside(path: Path) -> None:
    model = onnx.load(str(path / "step_4.onnx"))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    (path / "step_4.onnx").write_bytes(model.SerializeToString())
    relist(path)


def not_a_graph(path: Path) -> None:
    (path / "step_4.onnx").write_bytes(b"\x00" * 40)
    relist(path)


def other_version(path: Path) -> None:
    edit_manifest(path, lambda data: data.update(format_version=2))


def truncated_manifest(path: Path) -> None:
    text = (path / MANIFEST_NAME).read_text(encoding="utf-8")
    (path / MANIFEST_NAME).write_text(text[: len(text) // 2], encoding="utf-8")
    seal(path)


def oversized_manifest(path: Path) -> None:
    with (path / MANIFEST_NAME).open("ab") as file:
        file.write(b" " * MAX_MANIFEST_BYTES)


def deep_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).write_text("[" * 100_000, encoding="utf-8")
    seal(path)


def manifest_that_is_a_list(path: Path) -> None:
    (path / MANIFEST_NAME).write_text("[]", encoding="utf-8")
    seal(path)


def edited_manifest(path: Path) -> None:
    text = (path / MANIFEST_NAME).read_text(encoding="utf-8")
    (path / MANIFEST_NAME).write_text(text.replace('"max":5.0', '"max":9.0').replace('"max": 5.0', '"max": 9.0'))


def no_seal(path: Path) -> None:
    (path / SEAL_NAME).unlink()


def symlinked_seal(path: Path) -> None:
    outside = path.parent / "outside.sha256"
    (path / SEAL_NAME).rename(outside)
    (path / SEAL_NAME).symlink_to(outside)


def no_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).unlink()


def unknown_field(path: Path) -> None:
    edit_manifest(path, lambda data: data.update(entry_point="run.py"))


def student_with_other_timesteps(timesteps: list[int]) -> Change:
    def change(path: Path) -> None:
        edit_manifest(path, lambda data: data["students"][0].update(steps=2, timesteps=timesteps))

    change.__name__ = f"student_at_{timesteps}"
    return change


def changed(name: str, **fields: Any) -> Change:
    def change(path: Path) -> None:
        edit_manifest(path, lambda data: data.update(fields))

    change.__name__ = name
    return change


def repeated_student(path: Path) -> None:
    edit_manifest(path, lambda data: data["students"].append(data["students"][0]))


def no_encoder_of_images(path: Path) -> None:
    edit_manifest(path, lambda data: data["graphs"].pop("encode"))


OFF_THE_GRID = [{"steps": 2, "graph": "step_2", "timesteps": [0, 400]}]

CASES: tuple[tuple[Change, str], ...] = (
    (extra_file, r"notes\.txt is not listed in the manifest"),
    (missing_file, r"decode\.onnx is listed in the manifest but missing"),
    (symlinked_file, r"decode\.onnx is a symbolic link"),
    (symlinked_folder, r"more is a symbolic link"),
    (symlinked_manifest, r"has no manifest\.json"),
    (parent_path, r"'\.\./decode\.onnx' must be plain and inside the bundle"),
    (absolute_path, r"'/etc/passwd' must be plain and inside the bundle"),
    (backslash_path, r"must be plain and inside the bundle"),
    (executable_file, r"weights\.pkl has a file type no bundle holds"),
    (swapped_graphs, r"condition\.onnx has \d+ bytes, the manifest says \d+"),
    (swapped_and_relisted, r"the inputs or outputs of condition\.onnx are not those"),
    (external_data_outside, r"reads external data from '\.\./\.\./etc/passwd', outside the bundle"),
    (not_a_graph, r"step_4\.onnx is not an ONNX graph"),
    (other_version, r"format version 2; this halfstep reads version 1"),
    (truncated_manifest, r"manifest\.json is not valid JSON"),
    (oversized_manifest, r"manifest\.json is larger than \d+ bytes"),
    (deep_manifest, r"manifest\.json is not valid JSON"),
    (manifest_that_is_a_list, r"format version None"),
    (edited_manifest, r"manifest\.json was altered: its sha256 differs from manifest\.sha256"),
    (no_seal, r"has no manifest\.sha256; write the bundle again"),
    (symlinked_seal, r"has no manifest\.sha256"),
    (no_manifest, r"has no manifest\.json; write one with: python -m distill_jobs export"),
    (unknown_field, r"entry_point: Extra inputs are not permitted"),
    (repeated_student, r"students must be distinct in \(steps, sampler\)"),
    (changed("untrained_default", default_steps=3), r"students must .* include default_steps"),
    (changed("guidance", guidance={"min": 1, "max": 5, "default": 6}), r"guidance needs min <= default <= max"),
    (changed("encoder_off_the_grid", encoders=OFF_THE_GRID), r"2-step encoder are not its schedule's grid"),
    (no_encoder_of_images, r"graph 'encode' is needed but not described"),
    (student_with_other_timesteps([500]), r"the 2-step student has 1 timesteps"),
    (student_with_other_timesteps([499, 499]), r"the 2-step student: timesteps must fall from at most 999"),
    (student_with_other_timesteps([1000, 499]), r"the 2-step student: timesteps must fall from at most 999"),
    (student_with_other_timesteps([499, -1]), r"the 2-step student: timesteps must fall .* to at least 0"),
)


@pytest.mark.parametrize(("spoil", "message"), CASES, ids=[spoil.__name__ for spoil, _ in CASES])
def test_spoilt_bundles_are_refused(copy: Path, spoil: Change, message: str) -> None:
    spoil(copy)
    with pytest.raises(BundleError, match=message):
        verify_bundle(copy)


def test_an_untouched_copy_is_accepted(copy: Path) -> None:
    assert verify_bundle(copy).manifest.name == "toy-digits"


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a folder"):
        verify_bundle(tmp_path / "nowhere")


def test_a_hundred_random_bit_flips_are_refused(copy: Path) -> None:
    rng = np.random.default_rng(0)
    files = sorted(copy.iterdir())
    for _ in range(100):
        file = files[rng.integers(len(files))]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(bad))
        named = MANIFEST_NAME if file.name == SEAL_NAME else file.name
        with pytest.raises(BundleError, match=f"{named} was altered: its sha256 differs"):
            verify_bundle(copy)
        file.write_bytes(good)
