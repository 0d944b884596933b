"""Certificates that only the tests trust."""

import shutil
import subprocess
from pathlib import Path

import pytest


def certificate(folder: Path, host: str) -> tuple[Path, Path]:
    """Makes a certificate for a host, signed by itself, and returns its file and that of its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    files = folder / f"{host}.pem", folder / f"{host}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={host}"]
    more = ["-addext", f"subjectAltName=DNS:{host}", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run([*command, *more], check=True, capture_output=True)
    return files
