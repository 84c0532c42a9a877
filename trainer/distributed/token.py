"""The token of a launch: a secret of its processes, with which they sign what they write to each other."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

# The environment variable of workers and batch jobs. Only their user can read it.
TOKEN = "SILOTRAIN_TOKEN"

MIN_LENGTH = 16


def draw_token() -> bytes:
    """Return a new token."""
    return secrets.token_hex(32).encode()


def find_token(file: str | None = None) -> bytes:
    """Return the token that all processes of a launch find: that of the environment, or else that of a file.

    Args:
        file: `launch.token_file`; None: that of this user, which is made at the first use. Nodes that share the home
            folder share it.

    Raises:
        ValueError: the file cannot be read or made, is too short, or others may read it
    """
    if inherited := os.environ.get(TOKEN):
        return inherited.encode()
    try:
        path = Path(file).expanduser() if file else _user_file()
        mode, token = path.stat().st_mode, path.read_bytes().strip()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"launch.token_file={file or 'null'}: {reason}\n"
            "  valid: a file with the same secret on all nodes, made by (umask 077; openssl rand -hex 32 > FILE)"
        ) from error
    if mode & 0o077:
        raise ValueError(f"launch.token_file={path} may be read by others.\n  chmod 600 {path}, or make a new one")
    if len(token) < MIN_LENGTH:
        raise ValueError(f"launch.token_file={path} has {len(token)} characters.\n  valid: {MIN_LENGTH} or more")
    return token


def token_file(overrides: Sequence[str]) -> str | None:
    """Return `launch.token_file` of these overrides: a worker needs the token before it has a configuration."""
    given = [override.partition("=")[2] for override in overrides if override.startswith("launch.token_file=")]
    return given[-1] if given and given[-1] != "null" else None


def sign(token: bytes, name: bytes, value: bytes) -> bytes:
    """Return the signature of a value under this name, which has no NUL byte, in 64 hexadecimal digits."""
    return hmac.digest(token, name + b"\0" + value, "sha256").hex().encode()


def _user_file() -> Path:
    """Return the file with the token of this user; make it if there is none."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "silotrain"
    path = folder / "token"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = folder / f"token-{secrets.token_hex(8)}"
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as written:
            written.write(draw_token())
        try:
            path.hardlink_to(aside)
        except FileExistsError:  # another process was first
            pass
        finally:
            aside.unlink()
    return path
