"""C2PA content credentials in a finished video, by c2pa-python: who made it, and that a model did."""

import json
import logging
from pathlib import Path

from .. import __version__
from ..errors import TurboError, shown
from ..files import written_aside
from .video import ORIGIN

_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/" + ORIGIN["digitalSourceType"]
_MIMES = {".mp4": "video/mp4", ".mov": "video/quicktime"}
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


class Signer:
    """Signs videos with a certificate chain and its private key, both PEM."""

    def __init__(self, certificate, key):
        """Raises TurboError where the files are no certificate and key, do not belong together, or c2pa is missing."""
        c2pa = _c2pa()
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
        from cryptography.x509 import load_pem_x509_certificates

        raw = {}
        for path in (certificate, key):
            try:
                raw[path] = Path(path).read_bytes()
            except OSError as error:
                raise TurboError(f"--sign: {path} cannot be read ({error.strerror}). Check the path.") from error
        try:
            chain = load_pem_x509_certificates(raw[certificate])
        except ValueError as error:
            raise TurboError(
                f"--sign: {certificate} is no certificate chain in PEM. Give it first, then its key."
            ) from error
        private = _private_key(raw[key], key)
        form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        if chain[0].public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
            raise TurboError(f"--sign: {key} is not the key of the first certificate in {certificate}.")
        info = c2pa.C2paSignerInfo(_algorithm(private, key, c2pa), raw[certificate], raw[key], None)
        try:
            self._signer = c2pa.Signer.from_info(info)
        except c2pa.C2paError as error:
            raise TurboError(
                f"--sign: {certificate} cannot sign ({shown(error, 200)}). Use a C2PA certificate."
            ) from error

    def check(self, target) -> None:
        """Raise TurboError for a video of a format that takes no credentials."""
        if Path(target).suffix.lower() not in _MIMES:
            raise TurboError(f"--sign: {target} cannot hold content credentials. Name it {Path(target).stem}.mp4.")

    def has_signed(self, path) -> bool:
        """True where a video has credentials, by whomever."""
        return credentials(path) is not None

    def sign(self, path, target) -> None:
        """Put credentials into a video, which is to appear as `target`. Where that fails the video stays as it is, and
        one line says so: a video that is finished is never lost for its signature."""
        c2pa, path, target = _c2pa(), Path(path), Path(target)
        action = {
            "action": "c2pa.created",
            "digitalSourceType": _SOURCE,
            "softwareAgent": {"name": ORIGIN["software"], "version": __version__},
        }
        manifest = {
            "claim_generator_info": [{"name": ORIGIN["software"], "version": __version__}],
            "title": target.name,
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        try:
            with (
                c2pa.Builder(json.dumps(manifest)) as builder,
                written_aside(path, sweeps=False) as aside,
                open(path, "rb") as source,
                open(aside, "w+b") as signed,
            ):
                builder.sign(self._signer, _mime(target), source, signed)
        except (c2pa.C2paError, OSError, TurboError) as error:
            logging.warning("TurboWan: %s could not be signed (%s). It stays unsigned.", target, shown(error, 200))


def credentials(path) -> dict | None:
    """{"signed by", "made by", "source type", "state"} of a video with content credentials, None where it has none or
    c2pa-python is not installed."""
    try:
        c2pa = _c2pa()
    except TurboError:
        return None
    try:
        with open(path, "rb") as file, c2pa.Reader(_mime(path), file) as reader:
            found = json.loads(reader.json())
    except c2pa.C2paError as error:
        return None if isinstance(error, c2pa.C2paError.ManifestNotFound) else {"state": shown(error, 200)}
    try:
        return _told(found)
    except (KeyError, TypeError, AttributeError):  # a stranger's video may say anything
        return {"state": "not readable: its manifest has another form"}


def _told(found: dict) -> dict:
    active = found["manifests"][found["active_manifest"]]
    actions = [
        action
        for assertion in active.get("assertions", [])
        if assertion.get("label", "").startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]
    return {
        "signed by": active.get("signature_info", {}).get("issuer"),
        "made by": ", ".join(str(info.get("name")) for info in active.get("claim_generator_info", [])),
        "source type": next((a["digitalSourceType"] for a in actions if "digitalSourceType" in a), None),
        "state": found.get("validation_state"),
    }


def _algorithm(private, path, c2pa):
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _CURVES:
        name = _CURVES[private.curve.name]
    elif isinstance(private, rsa.RSAPrivateKey):
        name = "PS256"
    elif isinstance(private, ed25519.Ed25519PrivateKey):
        name = "ED25519"
    else:
        raise TurboError(f"--sign: {path} is of a kind that C2PA does not take. Use an EC P-256 key.")
    return getattr(c2pa.C2paSigningAlg, name)


def _private_key(raw: bytes, path):
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(raw, None)
    except (ValueError, TypeError) as error:  # TypeError: it has a password
        raise TurboError(
            f"--sign: {path} is no private key in PEM without a password. Give the certificate first."
        ) from error


def _mime(path) -> str:
    return _MIMES.get(Path(path).suffix.lower(), "video/x-matroska")  # refused by name


def _c2pa():
    try:
        import c2pa
    except ImportError as error:
        raise TurboError(
            'Content credentials need c2pa-python. Cure: pip install "comfyui-turbowan[sign]", or leave --sign out.'
        ) from error
    return c2pa
