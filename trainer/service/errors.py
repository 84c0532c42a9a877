"""Errors that answer a request: their HTTP status, their code of gRPC, and Triton's reason in the metrics."""

from __future__ import annotations

from typing import Any


class InferenceError(Exception):
    """The model has failed, by no fault of the request."""

    status, code, reason = 500, "INTERNAL", "BACKEND"


class InvalidRequestError(InferenceError):
    """The request is not as the protocol or the model wants it."""

    status, code, reason = 400, "INVALID_ARGUMENT", "OTHER"


class NotFoundError(InferenceError):
    """There is no such model, or not this version of it."""

    status, code, reason = 404, "NOT_FOUND", "OTHER"


class TooLargeError(InferenceError):
    """The body is larger than the server takes."""

    status, code, reason = 413, "RESOURCE_EXHAUSTED", "OTHER"


class OverloadedError(InferenceError):
    """The queue is full, or the memory for requests is."""

    status, code, reason = 503, "RESOURCE_EXHAUSTED", "REJECTED"


class ExpiredError(InferenceError):
    """The time that the client wanted to wait is over."""

    status, code, reason = 503, "DEADLINE_EXCEEDED", "REJECTED"


class ClientGoneError(InferenceError):
    """Nobody waits for the answer."""

    status, code, reason = 499, "CANCELLED", "CANCELED"  # the status is that of nginx


def unlike(name: str, got: Any, wanted: Any) -> InvalidRequestError:
    """Return the error of a part of a request that is not as it should be."""
    return InvalidRequestError(f"{name}: got {shorten(got)}, wanted {wanted}")


def shorten(value: Any, length: int = 80) -> str:
    """Return a value for a message; whatever a client sends, the message is short."""
    shown = repr(value[:length] if isinstance(value, str | bytes | list | tuple) else value)
    return shown if len(shown) <= length else f"{shown[:length]}..."
