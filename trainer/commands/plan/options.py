"""What is said under `plan.`: of the machines that will train, where they are not measured here."""

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
    """What the user knows of the machines; None: it is to be measured here.

    ranks             of the run; None: those that would be started
    bandwidth         bytes a second that a silo can send to the others
    bandwidth_inside  bytes a second that a rank can send to another one of its silo
    latency           seconds from a silo to another one
    seconds_per_step  of one rank with its share of the batch, and nothing sent
    """

    ranks: int | None = None
    bandwidth: float | None = None
    bandwidth_inside: float | None = None
    latency: float | None = None
    seconds_per_step: float | None = None


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """The arguments that are for the plan, and the run's overrides."""
    arguments = list(arguments)
    own = [argument for argument in arguments if argument.startswith(PREFIX)]
    return own, [argument for argument in arguments if argument not in own]


def parse_options(arguments: Iterable[str]) -> PlanOptions:
    """What these arguments say, plan.key=value each. Raises ValueError that names every fault."""
    read: dict[str, Any] = {}
    errors = []
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key not in READERS:
            errors.append(f"{key} is no key of the plan{suggest(key, list(READERS))}")
            continue
        reader, valid = READERS[key]
        read[key.removeprefix(PREFIX)] = reader(text)
        if not read[key.removeprefix(PREFIX)]:
            errors.append(f"{argument}\n  valid: {valid}")
    if errors:
        raise ValueError("\n".join(errors))
    return PlanOptions(**read)


def rate(text: str) -> float | None:
    """Bytes a second: bits and bytes with the prefixes of SI, or of 1024 (Ki, Mi, Gi, Ti). None if it says none.

    >>> [rate(text) for text in ("100Mbit", "1Gb/s", "10GB/s", "2MiB", "fast", "100")]
    [12500000.0, 125000000.0, 10000000000.0, 2097152.0, None, None]
    """
    if not (found := RATE.fullmatch(text)):
        return None
    value, prefix, binary, unit = found.groups()
    scale = (1024.0 if binary else 1000.0) ** POWERS[(prefix or "").lower()]
    return float(value) * scale / (1 if unit == "B" else 8)


def duration(text: str) -> float | None:
    """Seconds, of a text such as 50ms; None if it is not one."""
    found = DURATION.fullmatch(text)
    return float(found[1]) * SECONDS[found[2]] if found else None


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(NUMBER, text) else None


RATES = "a rate above 0, in bits or bytes a second: 100Mbit, 1.5Gbit, 10GB/s"

# Keys, how they are read, and what is valid.
READERS: dict[str, tuple[Callable[[str], float | None], str]] = {
    "plan.ranks": (_whole, "a whole number from 1"),
    "plan.bandwidth": (rate, RATES),
    "plan.bandwidth_inside": (rate, RATES),
    "plan.latency": (duration, "a time above 0: 50ms, 200us, 0.1s"),
    "plan.seconds_per_step": (_number, "a number above 0"),
}
