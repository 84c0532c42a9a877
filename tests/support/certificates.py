"""Certificates of TLS, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


def why_not() -> str:
    """Return the reason why none can be made; empty if they can."""
    return "" if shutil.which("openssl") else "openssl is not installed"


@dataclass(frozen=True)
class Signed:
    """A certificate, and its key."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """An authority, which signs certificates into its folder."""

    folder: Path
    name: str = "authority"

    def __post_init__(self) -> None:
        self._openssl("req", "-x509", *_new_key(self.name), "-out", f"{self.name}.pem", "-subj", f"/CN={self.name}")

    @property
    def certificate(self) -> Path:
        """The authority's own certificate."""
        return self.folder / f"{self.name}.pem"

    def sign(self, name: str) -> Signed:
        """Return a certificate of localhost, for servers and clients."""
        extensions = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE")
        signer = ("-CA", f"{self.name}.pem", "-CAkey", f"{self.name}.key")
        self._openssl(
            *("req", "-x509", *signer, *_new_key(name), "-out", f"{name}.pem", "-subj", f"/CN={name}", *extensions)
        )
        return Signed(self.folder / f"{name}.pem", self.folder / f"{name}.key")

    def _openssl(self, *arguments: str) -> None:
        run(*arguments, folder=self.folder)


def run(*arguments: str, folder: Path | None = None) -> None:
    """Run openssl."""
    subprocess.run(["openssl", *arguments], check=True, cwd=folder, capture_output=True)


def _new_key(name: str) -> tuple[str, ...]:
    return (
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-noenc",
        "-keyout",
        f"{name}.key",
        "-days",
        "2",
    )
