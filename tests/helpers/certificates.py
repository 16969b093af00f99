"""Certificates and keys as an authority would give them out, by OpenSSL."""

import shutil
import subprocess
from pathlib import Path

import pytest

USES = "keyUsage=critical,digitalSignature\nextendedKeyUsage=emailProtection\nbasicConstraints=critical,CA:FALSE\n"


def make_keys(folder: Path) -> Path:
    """Write chain.pem and leaf.key, and stranger.key, into a folder and return it; skips the test without OpenSSL."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    (folder / "uses").write_text(USES + "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n")
    for name in ("root", "leaf", "stranger"):
        openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", f"{name}.key")
    ca = "-addext", "keyUsage=critical,keyCertSign", "-addext", "basicConstraints=critical,CA:TRUE"
    openssl(
        "req", "-x509", "-new", "-key", "root.key", "-subj", "/CN=root/O=Root", "-days", "9", "-out", "root.pem", *ca
    )
    openssl("req", "-new", "-key", "leaf.key", "-subj", "/CN=leaf/O=A studio", "-out", "leaf.csr")
    openssl(
        "x509", "-req", "-in", "leaf.csr", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial", "-days", "9",
        "-extfile", "uses", "-out", "leaf.pem",
    )  # fmt: skip
    (folder / "chain.pem").write_text((folder / "leaf.pem").read_text() + (folder / "root.pem").read_text())
    return folder
