"""A signature binds every file of a bundle to one key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines.cli import app
from engines.errors import BundleError
from engines.signing import check_signature, sign_bundle, signature_of
from server.loading import load_pipelines
from server.settings import Settings

pytest.importorskip("model_signing", reason="the extra signing is not installed", exc_type=ImportError)

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, Path]:
    return key_pair(tmp_path, "ours")


@pytest.fixture
def bundle(tmp_path: Path, toy_bundle: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "toy"))


def test_a_signed_bundle_is_served(bundle: Path, ours: tuple[Path, Path]) -> None:
    sign_bundle(bundle, ours[0])
    assert signature_of(bundle).name == "toy.sig"
    settings = Settings(bundles=(bundle,), bundle_key=ours[1], cache_dir=None, backend="onnxruntime")
    assert list(load_pipelines(settings)) == ["toy-digits"]


def test_an_unsigned_bundle_is_refused_before_it_is_read(bundle: Path, ours: tuple[Path, Path]) -> None:
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="is not signed"):
        load_pipelines(Settings(bundles=(bundle,), bundle_key=ours[1], cache_dir=None))


def test_another_key_is_refused(bundle: Path, ours: tuple[Path, Path], tmp_path: Path) -> None:
    sign_bundle(bundle, key_pair(tmp_path, "theirs")[0])
    with pytest.raises(BundleError, match="another key"):
        check_signature(bundle, ours[1])


def test_a_signature_claiming_our_key_without_it_is_refused(
    bundle: Path, ours: tuple[Path, Path], tmp_path: Path
) -> None:
    mine = json.loads(sign_bundle(bundle, ours[0]).read_text())
    forged = json.loads(sign_bundle(bundle, key_pair(tmp_path, "theirs")[0]).read_text())
    forged["verificationMaterial"] = mine["verificationMaterial"]
    signature_of(bundle).write_text(json.dumps(forged))
    with pytest.raises(BundleError, match="differs"):
        check_signature(bundle, ours[1])


@pytest.mark.parametrize("change", ["alter", "add", "remove", "cut"])
def test_every_change_is_refused(bundle: Path, ours: tuple[Path, Path], change: str) -> None:
    signature = sign_bundle(bundle, ours[0])
    if change == "alter":
        (bundle / "tokenizer.json").write_text("{}")
    elif change == "add":
        (bundle / "more.onnx").write_bytes(b"x")
    elif change == "remove":
        (bundle / "tokenizer.json").unlink()
    else:
        signature.write_bytes(signature.read_bytes()[:100])
    with pytest.raises(BundleError, match="differs"):
        check_signature(bundle, ours[1])


def test_the_command_line_signs_and_verifies(bundle: Path, ours: tuple[Path, Path]) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["sign", str(bundle), "--key", str(ours[0])]).exit_code == 0
    assert runner.invoke(app, ["verify", str(bundle), "--public-key", str(ours[1])]).exit_code == 0
    signature_of(bundle).unlink()
    assert runner.invoke(app, ["verify", str(bundle), "--public-key", str(ours[1])]).exit_code == 1


def test_a_missing_key_is_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no key at .*none\.pem"):
        sign_bundle(bundle, tmp_path / "none.pem")
