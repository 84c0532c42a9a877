"""Every random stream of a run, derived from the seed and a few tags instead of carried from step to step.

A derived stream needs no saving and no sending: any rank can make the stream of any client, round or step at any
time, so a resumed run, and one with another number of ranks, draws what the first one drew.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch

Tag = int | str


def derive_seed(*tags: Tag) -> int:
    """A 63-bit seed that is a pure function of the tags: `derive(seed, "order", client, epoch)`."""
    text = "\x1f".join(f"{type(tag).__name__}:{tag}" for tag in tags)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*tags: Tag, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator of this device seeded with `derive(*tags)`."""
    return torch.Generator(device).manual_seed(derive_seed(*tags))


def numpy_generator(*tags: Tag) -> np.random.Generator:
    """A numpy generator seeded with `derive(*tags)`."""
    return np.random.default_rng(derive_seed(*tags))


def default_generators(device: torch.device) -> tuple[torch.Generator, ...]:
    """The generators that dropout and its like draw from on this device: the CPU's, and the GPU's if it is one.

    They are seeded directly, once a micro-batch: `torch.manual_seed` visits every backend and costs 300 microseconds.
    """
    if device.type != "cuda":
        return (torch.default_generator,)
    torch.cuda.init()
    return (torch.default_generator, torch.cuda.default_generators[device.index or 0])
