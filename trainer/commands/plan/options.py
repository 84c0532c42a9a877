"""Options `plan.key=value`: what is known of the machines that will train."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from trainer.utils.text import suggest

PREFIX = "plan."
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

NUMBER = r"(\d+\.?\d*|\.\d+)"
RATE = re.compile(NUMBER + r" ?(?:([kKmMgGtT])(i?))?(bit|b|B)(?:/s|ps)?")
DURATION = re.compile(NUMBER + r" ?(us|ms|s)")


@dataclass(frozen=True)
class PlanOptions:
    """Target machines, as given by the user. None: measured on this machine.

    Attributes:
        ranks: number of ranks of the run; None for those that the command would start.
        bandwidth: bytes per second that a silo can send to the others, or the coordinator of a federation to its sites.
        bandwidth_inside: bytes per second that a rank can send to another one of its silo.
        latency: seconds from one silo to another.
        seconds_per_step: of one rank with its share of the batch, without communication.
    """

    ranks: int | None = None
    bandwidth: float | None = None
    bandwidth_inside: float | None = None
    latency: float | None = None
    seconds_per_step: float | None = None


def parse_options(arguments: Iterable[str]) -> PlanOptions:
    """Parse arguments of the form plan.key=value.

    Raises:
        ValueError: lists everything that is wrong with them.
    """
    values: dict[str, Any] = {}
    errors: list[str] = []
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key not in PARSERS:
            errors.append(f"{key} is not an option of plan{suggest(key, list(PARSERS))}")
            continue
        parse, valid = PARSERS[key]
        value = values[key.removeprefix(PREFIX)] = parse(text)
        if not value:
            errors.append(f"{argument}\n  valid: {valid}")
    if errors:
        raise ValueError("\n".join(errors))
    return PlanOptions(**values)


def rate(text: str) -> float | None:
    """Parse bits or bytes per second to bytes per second; None if invalid.

    Prefixes are those of SI, or of 1024 (Ki, Mi, Gi, Ti).

    >>> [rate(text) for text in ("100Mbit", "1Gb/s", "10GB/s", "2MiB", "fast", "100")]
    [12500000.0, 125000000.0, 10000000000.0, 2097152.0, None, None]
    """
    if not (match := RATE.fullmatch(text)):
        return None
    value, prefix, binary, unit = match.groups()
    scale = (1024.0 if binary else 1000.0) ** POWERS[(prefix or "").lower()]
    return float(value) * scale / (1 if unit == "B" else 8)


def duration(text: str) -> float | None:
    """Return the seconds of a text such as 50ms; None if invalid."""
    match = DURATION.fullmatch(text)
    return float(match[1]) * SECONDS[match[2]] if match else None


def _integer(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(NUMBER, text) else None


RATES = "a rate above 0, in bits or bytes per second: 100Mbit, 1.5Gbit, 10GB/s"

# Of each key, its parser and the values that are valid.
PARSERS: dict[str, tuple[Callable[[str], float | None], str]] = {
    "plan.ranks": (_integer, "a whole number from 1"),
    "plan.bandwidth": (rate, RATES),
    "plan.bandwidth_inside": (rate, RATES),
    "plan.latency": (duration, "a time above 0: 50ms, 200us, 0.1s"),
    "plan.seconds_per_step": (_number, "a number above 0"),
}
