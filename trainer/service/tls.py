"""The certificates of a server, for HTTP and gRPC: checked when they are read, before anything listens."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True)
class ServerCertificates:
    """The files of TLS, in PEM.

    Attributes:
        certificate: of the server, and after it those between it and the authority.
        key: of the certificate, without a passphrase; a file that its owner alone reads, or root's group too.
        client_authority: certificates of the authorities of clients; None: clients need no certificate.
    """

    certificate: Path
    key: Path
    client_authority: Path | None = None

    def __post_init__(self) -> None:
        """Check the files.

        Raises:
            ValueError: a file cannot be read, is not PEM, or the key is another's, encrypted, or open to others.
        """
        for option, path in (("CERT", self.certificate), ("KEY", self.key), ("CA", self.client_authority)):
            if path is not None:
                _read(option, path)
        found = self.key.stat()
        # As PostgreSQL does it: a key of root may be lent to a group, as Kubernetes lends its secrets.
        if found.st_mode & (0o037 if found.st_uid == 0 else 0o077):
            raise ValueError(
                f"--tls: KEY {self.key} may be read by others: its mode is {found.st_mode & 0o777:o}\n"
                f"  chmod 600 {self.key}"
            )
        self.ssl_context()

    def ssl_context(self) -> ssl.SSLContext:
        """Return the context of an HTTP server: TLS 1.2 or later."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_passphrase)
        except ssl.SSLError as error:
            raise ValueError(
                f"--tls: CERT {self.certificate} and KEY {self.key} are no certificate and its key ({_reason(error)})\n"
                "  valid: two files in PEM, the key of this certificate and without a passphrase"
            ) from error
        if self.client_authority is not None:
            try:
                context.load_verify_locations(self.client_authority)
            except ssl.SSLError as error:
                raise ValueError(
                    f"--ca: {self.client_authority} has no certificate in PEM ({_reason(error)})"
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return the credentials of a gRPC server."""
        import grpc

        authority = self.client_authority
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            root_certificates=authority.read_bytes() if authority else None,
            require_client_auth=authority is not None,
        )


def _read(option: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise ValueError(f"--{'ca' if option == 'CA' else 'tls'}: {option} {path}: {error.strerror}") from error


def _no_passphrase() -> str:
    """Answer OpenSSL, which would ask on the terminal."""
    return ""


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")
