"""Who made a bundle: a signature beside its folder, over every file in it, with an elliptic-curve key.

``digits`` is signed in ``digits.sig``, in the format of OpenSSF model signing (a Sigstore bundle), key mode: no
network, no identity provider. A seal says that a bundle is whole; a signature says whose it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.errors import BundleError

_MISSING = "Signatures need the extra 'signing': pip install -e '.[signing]' in the checkout."


def signature_of(bundle: Path) -> Path:
    """Where the signature of a bundle lies: beside its folder, with ``.sig`` behind the name."""
    folder = bundle.resolve()
    return folder.with_name(f"{folder.name}.sig")


def sign_bundle(bundle: Path, private_key: Path) -> Path:
    """Sign every file of a bundle and return the signature's path.

    private_key: PEM, NIST P-256, P-384 or P-521. Raises: BundleError.
    """
    signing = _library().signing
    signature = signature_of(bundle)
    _need_key(private_key)
    try:
        signing.Config().use_elliptic_key_signer(private_key=private_key).sign(bundle, signature)
    except ValueError as error:
        raise BundleError(f"{private_key} cannot sign {bundle}: {error}") from None
    return signature


def check_signature(bundle: Path, public_key: Path) -> None:
    """Raises: BundleError unless the bundle, as it lies there, was signed with the key that belongs to this one."""
    verifying = _library().verifying
    signature = signature_of(bundle)
    _need_key(public_key)
    if not signature.is_file():
        raise BundleError(f"{bundle} is not signed: there is no {signature}. Sign it: python -m engines sign")
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(bundle, signature)
    except Exception as error:  # whatever a forged file makes the parsers raise
        reason = (
            "it was signed with another key" if "Key mismatch" in str(error) else "a file or the signature differs"
        )
        raise BundleError(f"{bundle} is not what the owner of {public_key} signed: {reason}") from None


def _need_key(key: Path) -> None:
    if not key.is_file():
        raise BundleError(f"There is no key at {key}; docs/deploying.md shows how to make a pair.")


def _library() -> Any:
    """Imported late: only who signs or checks needs it."""
    try:
        import model_signing  # noqa: PLC0415
    except ImportError:
        raise BundleError(_MISSING) from None
    return model_signing
