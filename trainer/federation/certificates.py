"""Certificates of a federation: an authority of its own, and a key and a certificate for each of its members.

A member is known by the name in its certificate, not by its host: sites have no fixed address, and the coordinator may
move to another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from trainer.utils.errors import ErrorCollector, raise_errors
from trainer.utils.text import first_few

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )
    from cryptography.x509.oid import ExtendedKeyUsageOID
except ImportError as error:
    raise ValueError("certificates need the package cryptography\n  pip install silotrain[sites]") from error

AUTHORITY = "ca"
AUTHORITY_DAYS = 3650
MAX_DAYS = 825  # of a member: a key that was lost is of use to its finder for no longer
CLOCK_SKEW = timedelta(hours=1)  # a member's clock may be behind that of the authority
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # the label of a host, which a certificate can hold
PRIVATE, PRIVATE_FOLDER = 0o600, 0o700
OPEN_TO_OTHERS, LENT_BY_ROOT = 0o077, 0o037  # root may lend a key to a group, as Kubernetes does with its secrets
EXPIRY_WARNING = timedelta(days=14)


@dataclass(frozen=True)
class Credentials:
    """By what a member proves its name, and knows the others: PEM texts.

    Attributes:
        name: of the member.
        authority: the certificate of the authority.
        certificate: the member's.
        key: its private key.
        expires: when the first of both certificates expires, in UTC.
    """

    name: str
    authority: bytes
    certificate: bytes
    key: bytes
    expires: datetime

    def expiry_warning(self) -> str:
        """Return a sentence if a certificate expires within two weeks; else an empty text."""
        if self.expires - datetime.now(UTC) >= EXPIRY_WARNING:
            return ""
        return (
            f"the certificates of {self.name} are valid until {self.expires:%Y-%m-%d %H:%M} UTC; links that are made "
            "later are refused\n"
            f"  python -m trainer certify ... {self.name} --renew, and start again with the new files"
        )


def certify(folder: Path, names: Sequence[str], days: int = 365, renew: bool = False) -> list[Path]:
    """Write a key and a certificate for each member, and those of the authority if the folder has none.

    Args:
        folder: of ca.pem, ca.key, NAME.pem and NAME.key; is made, for its owner alone.
        names: of the members: lower-case letters, digits and hyphens.
        days: how long the members' certificates are valid.
        renew: whether to replace the certificates of these members, and their keys.

    Returns:
        The certificates that were written.

    Raises:
        ValueError: lists names that are no names, or have a certificate already, or have none to renew; others can look
            into the folder; the authority cannot be read, or expires too early.
    """
    errors = [*name_errors(names), *_days_errors(days), *_existing_errors(folder, names, renew)]
    raise_errors([*errors, *_folder_errors(folder)])
    folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    authority, authority_key = _open_authority(folder, days)
    written = []
    for name in names:
        key = _new_key()
        certificate = _sign(name, key, authority.subject, authority_key, days)
        _write_pair(folder, name, certificate, key)
        written.append(folder / f"{name}.pem")
    return written


def load_credentials(folder: Path, name: str) -> Credentials:
    """Load the certificate of a member with its key, and that of the authority.

    Raises:
        ValueError: lists all that is wrong: a file is missing, damaged or readable by others, the key is of another
            certificate, the certificate is of another authority, of another name, or expired.
    """
    errors = ErrorCollector()
    texts = [errors.collect(partial(_read, folder / file)) for file in _files(name)]
    errors.raise_any()
    authority_text, certificate_text, key_text = texts
    authority = _parse(x509.load_pem_x509_certificate, authority_text, folder / f"{AUTHORITY}.pem")
    certificate = _parse(x509.load_pem_x509_certificate, certificate_text, folder / f"{name}.pem")
    key = _parse(_load_key, key_text, folder / f"{name}.key")
    raise_errors(_credential_errors(folder, name, authority, certificate, key))
    expires = min(authority.not_valid_after_utc, certificate.not_valid_after_utc)
    return Credentials(name, authority_text, certificate_text, key_text, expires)


def _files(name: str) -> tuple[str, str, str]:
    return f"{AUTHORITY}.pem", f"{name}.pem", f"{name}.key"


def name_errors(names: Sequence[str]) -> list[str]:
    """Return what is wrong with the names of members, which have to be labels of hosts."""
    if not names:
        return ["there are no members\n  valid: their names, such as coordinator berlin paris"]
    wrong = [name for name in names if not NAME.fullmatch(name) or name == AUTHORITY]
    twice = sorted({name for name in names if list(names).count(name) > 1})
    return [
        *(
            f"{name} is no name\n  valid: lower-case letters, digits and hyphens, up to 63, but not ca"
            for name in dict.fromkeys(wrong)
        ),
        *(f"{name} is named twice" for name in twice),
    ]


def _days_errors(days: int) -> list[str]:
    return [] if 1 <= days <= MAX_DAYS else [f"--days {days}\n  valid: 1 to {MAX_DAYS}"]


def _existing_errors(folder: Path, names: Sequence[str], renew: bool) -> list[str]:
    existing = [name for name in names if (folder / f"{name}.key").exists() or (folder / f"{name}.pem").exists()]
    if renew:
        missing = [name for name in names if name not in existing]
        return [
            f"{name} has no certificate in {folder} that could be renewed\n  without --renew it gets its first one"
            for name in missing
        ]
    if not existing:
        return []
    verb = "has a certificate" if len(existing) == 1 else "have certificates"
    return [f"{', '.join(first_few(existing, 5))} {verb} in {folder} already\n  --renew replaces them, and their keys"]


def _folder_errors(folder: Path) -> list[str]:
    if not folder.exists():
        return []
    if not folder.is_dir():
        return [f"{folder} is a file\n  valid: a new folder, or one that certify has written"]
    is_open = folder.stat().st_mode & OPEN_TO_OTHERS
    return [f"others can look into {folder}, which gets private keys\n  chmod 700 {folder}"] if is_open else []


def _open_authority(folder: Path, days: int) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    """Return the certificate and the key of the authority, which are made if there are none.

    Args:
        folder: of both.
        days: for which it is going to sign.
    """
    certificate_file, key_file = folder / f"{AUTHORITY}.pem", folder / f"{AUTHORITY}.key"
    if not certificate_file.exists() and not key_file.exists():
        key = _new_key()
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "silotrain authority")])
        certificate = _sign("", key, name, key, AUTHORITY_DAYS)
        _write_pair(folder, AUTHORITY, certificate, key)
        return certificate, key
    certificate = _parse(x509.load_pem_x509_certificate, _read(certificate_file), certificate_file)
    key = _parse(_load_key, _read(key_file), key_file)
    if key.public_key() != certificate.public_key():
        raise ValueError(f"{key_file} is not the key of {certificate_file}\n  restore both from a copy")
    if _is_open_to_others(key_file):
        raise ValueError(f"{key_file} can be read by others\n  chmod 600 {key_file}")
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    if left < timedelta(days=days):
        raise ValueError(
            f"{certificate_file} expires on {certificate.not_valid_after_utc:%Y-%m-%d}, before --days {days} are over\n"
            f"  valid: --days of at most {max(left.days, 0)}; or another folder, in which a new authority is made"
        )
    return certificate, key


def _sign(
    name: str, key: EllipticCurvePrivateKey, issuer: Any, issuer_key: EllipticCurvePrivateKey, days: int
) -> x509.Certificate:
    """Sign the certificate of a member; with an empty name that of the authority, by itself."""
    now, is_authority = datetime.now(UTC), not name
    subject = issuer if is_authority else x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_authority,
                key_cert_sign=is_authority,
                crl_sign=is_authority,
                decipher_only=False,
                **usage,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not is_authority:
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(purposes, critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _credential_errors(
    folder: Path, name: str, authority: x509.Certificate, certificate: x509.Certificate, key: EllipticCurvePrivateKey
) -> list[str]:
    errors, files = [], [folder / file for file in _files(name)]
    if _is_open_to_others(files[2]):
        errors.append(f"{files[2]} can be read by others\n  chmod 600 {files[2]}")
    if key.public_key() != certificate.public_key():
        errors.append(f"{files[2]} is not the key of {files[1]}")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):  # of another issuer, another kind of key, another key
        errors.append(f"{files[1]} is not signed by {files[0]}\n  take both from the folder that certify wrote")
    names = certificate.subject.rfc4514_string()
    if names != f"CN={name}":
        errors.append(f"{files[1]} is the certificate of {names.removeprefix('CN=')}, not of {name}")
    for file, each in zip(files, (authority, certificate), strict=False):
        if each.not_valid_after_utc < datetime.now(UTC):
            errors.append(
                f"{file} expired on {each.not_valid_after_utc:%Y-%m-%d}\n  python -m trainer certify ... --renew"
            )
        if each.not_valid_before_utc > datetime.now(UTC):
            errors.append(f"{file} is valid from {each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: is this clock right?")
    return errors


def _is_open_to_others(key: Path) -> bool:
    found = key.stat()
    return bool(found.st_mode & (LENT_BY_ROOT if found.st_uid == 0 else OPEN_TO_OTHERS))


def _new_key() -> EllipticCurvePrivateKey:
    return generate_private_key(SECP256R1())


def _load_key(text: bytes) -> EllipticCurvePrivateKey:
    key = load_pem_private_key(text, None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError("it is a key of another kind")
    return key


def _write_pair(folder: Path, name: str, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> None:
    _write(folder / f"{name}.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    _write(folder / f"{name}.pem", certificate.public_bytes(Encoding.PEM))


def _write(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read, from its first byte on, aside, and rename it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _parse(parse: Any, text: bytes, path: Path) -> Any:
    try:
        return parse(text)
    except Exception as error:  # the library does not document what it raises for a file of another format
        raise ValueError(f"{path} is damaged, or no PEM file\n  restore it from a copy") from error
