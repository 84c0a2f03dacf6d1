"""Bundles on disk: written last and atomically, verified before anything but the manifest is parsed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from pydantic import ValidationError

from engines.errors import BundleError
from engines.manifest import FORMAT_VERSION, MANIFEST_NAME, SEAL_NAME, BundleManifest, FileRecord

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
INLINE_LIMIT_BYTES = 1 << 30
"""Graphs with more weights than this keep them in a .onnx.data file beside them: protobuf ends at 2 GiB."""
ALLOWED_SUFFIXES = frozenset({".onnx", ".data", ".json", ".txt", ".yaml", ".md", ".png"})


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its folder and what its manifest says. data_files: the weights that a graph file reads.

    sha256: of the manifest, which holds the hash of every other file, so it names this version of the bundle.
    """

    path: Path
    manifest: BundleManifest
    data_files: Mapping[str, tuple[str, ...]]
    sha256: str

    def file(self, name: str) -> Path:
        """Path of a listed file."""
        return self.path / name

    def graph_file(self, graph: str) -> Path:
        """Path of a graph's ONNX file."""
        return self.path / self.manifest.graphs[graph].file

    def graph_sha256(self, graph: str) -> str:
        """Hash of a graph, weights beside its ONNX file included: part of every engine cache key."""
        file = self.manifest.graphs[graph].file
        first, *others = (self.manifest.files[name].sha256 for name in (file, *self.data_files[file]))
        return hashlib.sha256("".join((first, *others)).encode()).hexdigest() if others else first


def file_records(folder: Path) -> dict[str, FileRecord]:
    """sha256 and size of every file under ``folder`` but the manifest and its seal, by relative path."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: FileRecord(sha256=_sha256(path), bytes=path.stat().st_size)
        for name, path in files.items()
        if name not in {MANIFEST_NAME, SEAL_NAME}
    }


def write_bundle(staging: Path, destination: Path, manifest: BundleManifest) -> Bundle:
    """Turn a folder of finished files into a bundle at ``destination``, replacing an older one.

    staging: on the same file system as destination; consumed. The manifest and its seal are written last, the
    whole is verified, and only then renamed into place. Raises: BundleError when something else stands there.
    """
    check_replaceable(destination)
    target = staging / MANIFEST_NAME
    target.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (staging / SEAL_NAME).write_text(_sha256(target) + "\n", encoding="utf-8")
    staging.chmod(0o755)  # temporary folders are their owner's alone, and servers run as somebody else
    for path in (*staging.rglob("*"), staging):
        _fsync(path)
    written = verify_bundle(staging)
    previous = destination.with_name(f".{destination.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    destination.parent.mkdir(parents=True, exist_ok=True)
    if destination.exists():
        destination.rename(previous)
    staging.rename(destination)
    shutil.rmtree(previous, ignore_errors=True)
    return replace(written, path=destination)


def check_replaceable(destination: Path) -> None:
    """Raises: BundleError when ``destination`` holds anything but a bundle, which would be lost, or has no name."""
    if not destination.name:
        raise BundleError(f"{destination} cannot be replaced as a whole; give the bundle a folder with a name")
    if not destination.exists() or (destination / MANIFEST_NAME).is_file():
        return
    if not destination.is_dir() or any(destination.iterdir()):
        raise BundleError(f"{destination} exists and is not a bundle; choose another folder, or remove it yourself")


def verify_bundle(path: Path) -> Bundle:
    """Check a bundle completely and return it.

    Order: the manifest's seal, the manifest, the set of files, their sizes and hashes, and only then the graphs.
    Raises: BundleError naming the file and what is wrong with it.
    """
    manifest = _read_manifest(path)
    _check_files(path, manifest)
    data_files = {graph.file: _check_graph(path, graph.file, manifest) for graph in manifest.graphs.values()}
    return Bundle(path, manifest, data_files, _sha256(path / MANIFEST_NAME))


def _read_manifest(path: Path) -> BundleManifest:
    file = path / MANIFEST_NAME
    if not path.is_dir():
        raise BundleError(f"{path} is not a folder; a bundle is a folder with a {MANIFEST_NAME}")
    if not file.is_file() or file.is_symlink():
        raise BundleError(f"{path} has no {MANIFEST_NAME}; write one with: python -m distill_jobs export")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{file} is larger than {MAX_MANIFEST_BYTES} bytes; that is not one of our manifests")
    _check_seal(path, file)
    try:
        data = json.loads(file.read_bytes())
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{file} has format version {version!r}; this halfstep reads version {FORMAT_VERSION}"
            )
        return BundleManifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"{file}: {where}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise BundleError(f"{file} is not valid JSON") from None


def _check_seal(path: Path, file: Path) -> None:
    seal = path / SEAL_NAME
    if not seal.is_file() or seal.is_symlink():
        raise BundleError(f"{path} has no {SEAL_NAME}; write the bundle again with: python -m distill_jobs export")
    with seal.open("rb") as opened:
        written = opened.read(80)
    if written != f"{_sha256(file)}\n".encode():
        raise BundleError(f"{file} was altered: its sha256 differs from {SEAL_NAME}")


def _check_files(path: Path, manifest: BundleManifest) -> None:
    present = set()
    for entry in path.rglob("*"):
        name = entry.relative_to(path).as_posix()
        if entry.is_symlink():
            raise BundleError(f"{path}: {name} is a symbolic link; a bundle holds plain files only")
        if entry.is_dir():
            continue
        if not entry.is_file():
            raise BundleError(f"{path}: {name} is not a plain file")
        present.add(name)
    expected = {*manifest.files, MANIFEST_NAME, SEAL_NAME}
    if missing := sorted(expected - present):
        raise BundleError(f"{path}: {missing[0]} is listed in the manifest but missing")
    if extra := sorted(present - expected):
        raise BundleError(f"{path}: {extra[0]} is not listed in the manifest")
    for name, record in manifest.files.items():
        file = path / name
        if file.suffix not in ALLOWED_SUFFIXES:
            raise BundleError(f"{path}: {name} has a file type no bundle holds")
        if file.stat().st_size != record.bytes:
            raise BundleError(f"{path}: {name} has {file.stat().st_size} bytes, the manifest says {record.bytes}")
        if _sha256(file) != record.sha256:
            raise BundleError(f"{path}: {name} was altered: its sha256 differs from the manifest's")


def _check_graph(path: Path, name: str, manifest: BundleManifest) -> tuple[str, ...]:
    """Check a graph's interface, and return the data files it reads."""
    try:
        model = onnx.load(str(path / name), load_external_data=False)
    except Exception as error:  # protobuf raises its own, undocumented types
        raise BundleError(f"{path}: {name} is not an ONNX graph ({type(error).__name__})") from None
    data_files = set()
    for tensor in onnx.external_data_helper._get_all_tensors(model):
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            location = (Path(name).parent / entry.value).as_posix()
            if location not in manifest.files:
                raise BundleError(f"{path}: {name} reads external data from {entry.value!r}, outside the bundle")
            data_files.add(location)
    inputs = {i.name for i in model.graph.input}
    outputs = {o.name for o in model.graph.output}
    spec = next(g for g in manifest.graphs.values() if g.file == name)
    if inputs != {t.name for t in spec.inputs} or outputs != {t.name for t in spec.outputs}:
        raise BundleError(f"{path}: the inputs or outputs of {name} are not those its manifest describes")
    return tuple(sorted(data_files))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
