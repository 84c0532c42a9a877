"""Messages between two launchers that hold the same token."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
from contextlib import suppress
from threading import Lock
from typing import Any

from trainer.distributed.token import sign

SILENCE_SECONDS = 4  # after which the other side is taken to be lost
MAX_BYTES = 16 << 20  # of a message
NONCE_BYTES, SIGNATURE_BYTES = 32, 64

Message = dict[str, Any]


class UntrustedError(OSError):
    """The other side does not hold the token."""


class Channel:
    """One side of a connection, over which both send JSON, each message signed.

    The signature covers a number that each side has drawn, which side it is, and the number of messages before, so that
    no message of another connection, or of the other side, or a repeated one, is taken.

    Args:
        connection: to the other side, which is not heard for `SILENCE_SECONDS` only if it is lost
        token: of the launch
        is_caller: whether this side has opened the connection

    Raises:
        OSError: the other side is lost
    """

    def __init__(self, connection: socket.socket, token: bytes, is_caller: bool):
        connection.settimeout(SILENCE_SECONDS)
        self._connection, self._token, self._sending = connection, token, Lock()
        ours = secrets.token_bytes(NONCE_BYTES)
        connection.sendall(ours)
        theirs = self._read(NONCE_BYTES)
        session = (ours + theirs if is_caller else theirs + ours).hex()
        sides = ("caller", "answerer") if is_caller else ("answerer", "caller")
        self._our_name, self._their_name = (f"{session}/{side}" for side in sides)
        self._sent = self._received = 0

    def send(self, message: Message) -> None:
        """Send a message; raise OSError if the other side is lost."""
        body = json.dumps(message).encode()
        with self._sending:
            signature = sign(self._token, f"{self._our_name}/{self._sent}".encode(), body)
            self._sent += 1
            self._connection.sendall(struct.pack("!I", len(body)) + signature + body)

    def receive(self) -> Message:
        """Wait for the next message, and return it.

        Raises:
            UntrustedError: it is not signed by the token
            OSError: the other side is lost
        """
        (size,) = struct.unpack("!I", self._read(4))
        if size > MAX_BYTES:
            raise UntrustedError(f"a message of {size} bytes")
        signature, body = self._read(SIGNATURE_BYTES), self._read(size)
        if not hmac.compare_digest(signature, sign(self._token, f"{self._their_name}/{self._received}".encode(), body)):
            raise UntrustedError("a message without the right signature")
        self._received += 1
        return json.loads(body)

    def close(self) -> None:
        """Close the connection; the other side, and a thread that waits in `receive`, notice at once."""
        with suppress(OSError):  # the other side was first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, count: int) -> bytes:
        read = bytearray()
        while len(read) < count:
            part = self._connection.recv(count - len(read))
            if not part:
                raise ConnectionResetError("the other side has closed the connection")
            read += part
        return bytes(read)
