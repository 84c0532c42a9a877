"""Random streams, derived from the run's seed and a few tags.

Derived streams have no state to save or send: any rank can make the stream of any client, round or step at any time. A
resumed run, or one with another number of ranks, therefore draws the same numbers.
"""

from __future__ import annotations

import random  # noqa: TID251 (users draw from it, and their draws are seeded here)
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch

Tag = int | str


def derive_seed(*tags: Tag) -> int:
    """Return a 63-bit seed that is a pure function of the tags, as in `derive_seed(seed, "order", client, epoch)`."""
    text = "\x1f".join(f"{type(tag).__name__}:{tag}" for tag in tags)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*tags: Tag, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a torch generator on this device, seeded by `derive_seed(*tags)`."""
    return torch.Generator(device).manual_seed(derive_seed(*tags))


def numpy_generator(*tags: Tag) -> np.random.Generator:
    """Make a numpy generator, seeded by `derive_seed(*tags)`."""
    return np.random.default_rng(derive_seed(*tags))


def hash_numbers(numbers: np.ndarray, salt: int) -> np.ndarray:
    """Hash integers to uint64 of the same shape, by a bijection for each salt.

    It is SplitMix64 (Steele, Lea and Flood 2014), which gives any number of its sequence directly. There is no state,
    and it does not matter who draws in which order.
    """
    mixed = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def default_generators(device: torch.device) -> tuple[torch.Generator, ...]:
    """Return the default generators that layers such as dropout use: the CPU's, and the GPU's if the device is one.

    Seed them directly, once per micro-batch: `torch.manual_seed` visits every backend and costs 300 microseconds.
    """
    if device.type != "cuda":
        return (torch.default_generator,)
    torch.cuda.init()
    return (torch.default_generator, torch.cuda.default_generators[device.index or 0])


def seed_default_generators(device: torch.device, *tags: Tag) -> None:
    """Seed the default generators by `derive_seed(*tags)`."""
    for generator in default_generators(device):
        generator.manual_seed(derive_seed(*tags))


_BIT_GENERATOR = np.random.MT19937(0)  # of numpy's functions in `separate_generators`: swapping is faster than copying


@contextmanager
def separate_generators() -> Iterator[None]:
    """Let the block seed and use the default generators of torch on the CPU, numpy and random; restore them after it.

    They are what a user's code draws from where it has no generator of its own.
    """
    # Numpy's stubs lack both functions.
    get_bit_generator, set_bit_generator = np.random.get_bit_generator, np.random.set_bit_generator  # pyright: ignore
    before = torch.default_generator.get_state(), get_bit_generator(), random.getstate()
    set_bit_generator(_BIT_GENERATOR)
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        set_bit_generator(before[1])
        random.setstate(before[2])


@contextmanager
def preserve_random_states(device: torch.device) -> Iterator[None]:
    """Restore the generators of `separate_generators` after the block, and that of the GPU."""
    states = [(generator, generator.get_state()) for generator in default_generators(device)]
    with separate_generators():
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def seed_generators(seed: int) -> None:
    """Seed the three generators by a 64-bit seed: torch and numpy by halves of it, as equal ones draw equal bits."""
    torch.default_generator.manual_seed(seed & 0xFFFFFFFF)
    np.random.seed(seed >> 32)  # noqa: TID251 (that of `separate_generators`)
    random.seed(seed)


def draw_from_generators() -> tuple[float, float, float]:
    """Draw a number from each of the three generators."""
    return torch.rand(()).item(), np.random.random_sample(), random.random()
