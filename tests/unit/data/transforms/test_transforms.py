"""Transforms: their results by numpy, and random numbers that depend only on the example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.data import PerClientSource, Source, TensorSource
from trainer.data.transforms import (
    Batch,
    Compose,
    CutOut,
    MaskTokens,
    MixUp,
    Normalise,
    RandomCrop,
    RandomFlip,
    RandomRotation,
    Standardise,
    Transform,
)
from trainer.data.transforms.base import uniform

CPU = torch.device("cpu")
laws = settings(deadline=None, max_examples=40)
COUNT, CLASSES = 40, 4

RANDOM: dict[str, Transform] = {
    "crop": RandomCrop(2),
    "flip": RandomFlip(),
    "rotate": RandomRotation(30),
    "cutout": CutOut(3),
    "mixup": MixUp(0.4),
}


def images(channels: int = 2, side: int = 6) -> TensorSource:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(COUNT, channels, side, side, generator=generator)
    return TensorSource(inputs, torch.randint(0, CLASSES, (COUNT,), generator=generator))


def trained(transforms: Mapping[str, Transform], ids: Tensor, epoch: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    return Compose(transforms, CLASSES).for_training(images(), ids, torch.arange(COUNT), seed, epoch, CPU)


# Draws


@laws
@given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(1, 5))
def test_a_draw_is_of_its_example_alone(key: int, ids: list[int], count: int):
    together = uniform(key, torch.tensor(ids), count)
    assert ((together >= 0) & (together < 1)).all()
    for row, one in zip(together, ids, strict=True):
        assert torch.equal(row, uniform(key, torch.tensor([one]), count)[0])


def test_draws_are_those_of_splitmix64():
    """The first numbers from seed 1234567, as published with the generator's C code."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = uniform(1234567, torch.tensor([0]), 3)[0]
    np.testing.assert_array_equal(drawn.numpy(), [(number >> 11) * 2.0**-53 for number in published])


def test_draws_are_uniform():
    drawn = uniform(7, torch.arange(50_000), 2)
    counts = torch.histc(drawn, 20, 0, 1)
    assert (counts / 5000 - 1).abs().max() < 0.06
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.02


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_random_is_of_seed_epoch_and_example(name: str):
    """It does not depend on the batch of an example."""
    transforms = {name: RANDOM[name]}
    ids = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    whole = trained(transforms, ids)
    parts = [trained(transforms, part) for part in ids.split(7)]
    for one, all_parts in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(all_parts), rtol=0, atol=1e-6)
    assert torch.equal(whole[0], trained(transforms, ids)[0])
    assert not torch.equal(whole[0], trained(transforms, ids, epoch=1)[0])
    assert not torch.equal(whole[0], trained(transforms, ids, seed=1)[0])


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_random_is_not_of_evaluation(name: str):
    examples = images().fetch(torch.arange(COUNT))
    for ours, theirs in zip(
        Compose({name: RANDOM[name]}, CLASSES).for_evaluation(examples, CPU), examples, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_two_of_a_kind_draw_apart():
    ids = torch.arange(COUNT)
    once = trained({"flip": RandomFlip()}, ids)[0]
    twice = trained({"flip": RandomFlip(), "again": RandomFlip()}, ids)[0]
    assert not torch.equal(twice, once) and not torch.equal(twice, images().inputs)


# Transforms


def test_a_crop_is_a_window_of_the_padded_image():
    inputs, _ = images().fetch(torch.arange(COUNT))
    padded = np.pad(inputs.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    seen = set()
    for image, cut in zip(padded, trained({"crop": RandomCrop(2)}, torch.arange(COUNT))[0].numpy(), strict=True):
        windows = {(i, j) for i in range(5) for j in range(5) if (image[:, i : i + 6, j : j + 6] == cut).all()}
        assert windows
        seen |= windows
    assert len(seen) > 12


def test_a_flip_mirrors_about_half():
    inputs, flipped = images().inputs, trained({"flip": RandomFlip()}, torch.arange(COUNT))[0]
    is_same = (flipped == inputs).flatten(1).all(1)
    assert torch.equal(flipped[~is_same], inputs[~is_same].flip(3))
    assert 8 < is_same.sum() < 32


def test_a_turn_by_nothing_is_nothing_and_by_a_quarter_is_numpys():
    batch = Batch(
        images().inputs, images().targets, torch.arange(COUNT), torch.arange(COUNT), 0, lambda ids: images().fetch(ids)
    )
    same, _ = RandomRotation(1e-6)(batch)
    torch.testing.assert_close(same, batch.inputs, rtol=0, atol=1e-4)
    turned, _ = _Always(90)(batch)
    np.testing.assert_allclose(turned.numpy(), np.rot90(batch.inputs.numpy(), 1, (2, 3)), atol=1e-4)


class _Always(RandomRotation):
    """Rotates by exactly this number of degrees."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        class Drawn(Batch):
            def uniform(self, count: int = 1) -> Tensor:
                return torch.ones(len(self.numbers), count, dtype=torch.float64)

        return super().__call__(Drawn(**vars(batch)))


def test_a_file_is_changed_alike_whatever_silo_has_it():
    """Three clients' files on one rank, separately and as one file: the same examples for each client."""
    chain = Compose({"crop": RandomCrop(2), "flip": RandomFlip(), "mixup": MixUp()}, classes=CLASSES)
    inputs, targets = images().fetch(torch.arange(COUNT))
    sizes = [11, 20, COUNT - 31]
    files = [TensorSource(*part) for part in zip(inputs.split(sizes), targets.split(sizes), strict=True)]

    def seen(source: Source, ids: Tensor) -> tuple[Tensor, Tensor]:
        return chain.for_training(source, ids, ids, 3, 1, torch.device("cpu"))

    for client, ids in enumerate(torch.arange(COUNT).split(sizes)):
        expected = seen(images(), ids)
        for here in ([client], [0, 1, 2]):
            apart = PerClientSource(sizes, {each: files[each] for each in here}, [0, 1, 2], [0, 0, 0])
            found = seen(apart, torch.from_numpy(apart.ids(client)))
            assert all(map(torch.equal, found, expected))


def test_a_cutout_is_one_square_of_zeros():
    cut = trained({"cutout": CutOut(3)}, torch.arange(COUNT))[0]
    for image, before in zip(cut, images().inputs, strict=True):
        is_out = (image == 0).all(0)
        rows, columns = is_out.any(1), is_out.any(0)
        assert (
            torch.equal(is_out, rows[:, None] & columns[None, :]) and 2 <= rows.sum() <= 3 and 2 <= columns.sum() <= 3
        )
        assert torch.equal(image[:, ~is_out], before[:, ~is_out])


def test_mixed_examples_are_between_two_of_their_client():
    members = torch.tensor([1, 5, 9])
    source = images()
    inputs, targets = Compose({"mixup": MixUp(1.0)}, CLASSES).for_training(source, members, members, 0, 0, CPU)
    assert targets.shape == (3, CLASSES)
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    for mixed, id in zip(inputs, members, strict=True):
        spans = torch.stack([source.inputs[other] - source.inputs[id] for other in members]).flatten(1)
        away = (mixed - source.inputs[id]).flatten()
        parts = [float(away @ span / span.square().sum().clamp_(min=1e-9)) for span in spans]
        assert any(
            0 <= part <= 1 and torch.allclose(away, part * span, atol=1e-5)
            for part, span in zip(parts, spans, strict=True)
        )


def test_mixing_comes_after_what_was_before_it():
    """The other example is normalised and flipped too, by its own draws."""
    chain = Compose({"normalise": Normalise(100.0, 1.0), "mixup": MixUp(1.0)}, CLASSES)
    inputs, _ = chain.for_training(images(), torch.arange(COUNT), torch.arange(COUNT), 0, 0, CPU)
    assert (inputs.mean((1, 2, 3)) + 100).abs().max() < 1


def test_some_tokens_are_masked():
    tokens = TensorSource(torch.randint(1, 50, (200, 30)), torch.zeros(200, 30, dtype=torch.int64))
    chain = Compose({"mask": MaskTokens(0.2, 0)}, 50)
    inputs, targets = chain.for_training(tokens, torch.arange(200), torch.arange(200), 0, 0, CPU)
    is_masked = inputs == 0
    assert 0.18 < is_masked.float().mean() < 0.22 and torch.equal(targets, tokens.targets)
    assert torch.equal(inputs[~is_masked], tokens.inputs[~is_masked])


def test_given_numbers_normalise():
    inputs, _ = Compose({"n": Normalise([1.0, 2.0], [0.5, 4.0])}).for_evaluation(images().fetch(torch.arange(5)), CPU)
    expected = (images().inputs[:5].numpy() - np.array([1, 2])[:, None, None]) / np.array([0.5, 4])[:, None, None]
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-6)


class Ranks:
    """Sums over ranks that fit one after the other, again and again until each has had all sums."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []
        self.parts: list[torch.Tensor] = []

    def __call__(self, own: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls <= len(self.sums):
            return self.sums[self.calls - 1]
        if self.calls == len(self.sums) + 1:
            self.parts.append(own)
        return own + 0

    def begin(self) -> Ranks:
        self.calls = 0
        return self


def standardised_by(source: TensorSource, shards: Sequence[torch.Tensor]) -> Standardise:
    """Return the transform as fitted by ranks that have these examples."""
    ranks = Ranks()
    for _ in range(3):
        fitted = [Compose({"s": Standardise()}).fit(source, ids, ranks.begin(), CPU) for ids in shards]
        if ranks.parts:
            ranks.sums.append(torch.stack(ranks.parts).sum(0))
            ranks.parts.clear()
    for chain in fitted:
        standardise, first = chain.transforms["s"], fitted[0].transforms["s"]
        assert isinstance(standardise, Standardise) and isinstance(first, Standardise)
        assert torch.equal(standardise.mean, first.mean) and torch.equal(standardise.std, first.std)
    assert isinstance(standardise, Standardise)
    return standardise


@laws
@given(st.integers(1, 5), st.integers(0, 10_000))
def test_statistics_are_those_of_all_examples_together(parts: int, offset: int):
    """They do not depend on the division, to 1e-6 of those in float64."""
    source = TensorSource(images(3).inputs + offset, images(3).targets)
    together = standardised_by(source, torch.arange(COUNT).tensor_split(parts))
    columns = source.inputs.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(together.mean, columns.mean(1), rtol=1e-6)
    np.testing.assert_allclose(together.std, columns.std(1), rtol=1e-6)


def test_a_channel_that_never_changes_is_centred():
    source = TensorSource(torch.full((COUNT, 1), 3.0), torch.zeros(COUNT, dtype=torch.int64))
    chain = Compose({"s": Standardise()}).fit(source, torch.arange(COUNT), lambda own: own, CPU)
    assert not chain.for_evaluation(source.fetch(torch.arange(4)), CPU)[0].any()


EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(
    ("values", "std"),
    [
        (torch.full((1000,), 0.1), 1),
        (torch.full((1000,), -1.7e9), 1),
        (torch.full((1000,), 1e-42), 1),
        (torch.tensor([0.1] * 999 + [0.1 * (1 + EPS)]), 1),  # one number is off by rounding
        (100 * (1 + EPS * (torch.arange(1000) % 3)), 1),
        (1.7e9 + 86_400 * (torch.arange(1000.0) % 7), 172_800),  # seconds of a week's days
        (1e30 * (torch.arange(1000.0) % 2), 5e29),
        (1e-30 * (torch.arange(1000.0) % 2), 5e-31),
        (1000 + 0.01 * (torch.arange(1000.0) % 2), 0.005),
        (torch.tensor([0.0] * 999 + [1.0]), math.sqrt(0.999 * 0.001)),
    ],
)
def test_constant_near_constant_and_large_columns(values: torch.Tensor, std: float, shards: int):
    """A spread that is rounding is not divided by; any other is as numpy has it in float64."""
    source = TensorSource(torch.stack((values, torch.arange(1000.0)), 1), torch.zeros(1000, dtype=torch.int64))
    found = standardised_by(source, torch.arange(1000).tensor_split(shards))
    columns = source.inputs.double().numpy()
    np.testing.assert_allclose(found.mean, columns.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, [1 if std == 1 else columns[:, 0].std(), columns[:, 1].std()], rtol=1e-9)
    assert found.std[0].item() == pytest.approx(std, rel=0.01)


def test_precision_of_the_inputs_decides_what_is_rounding():
    """A spread of 1e-9 of the mean can be real in float64."""
    inputs = (1 + 1e-9 * (torch.arange(1000) % 2).double())[:, None]
    source = TensorSource(inputs, torch.zeros(1000, dtype=torch.int64))
    assert standardised_by(source, [torch.arange(1000)]).std.item() == pytest.approx(5e-10, rel=1e-4)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_by_their_channel(number: float):
    """One rank has the bad number, and all refuse: each channel's statistics would be it."""
    inputs = torch.randn(10, 3)
    inputs[7, 1] = number
    source, ranks = TensorSource(inputs, torch.zeros(10, dtype=torch.int64)), Ranks()
    with pytest.raises(ValueError, match="numbers of channel 1 are not finite"):
        Compose({"s": Standardise()}).fit(source, torch.arange(10), ranks.begin(), CPU)


def test_statistics_are_carried_to_other_examples():
    """Those of one chain, in another, transform as it does; by the names of the transforms, bit for bit."""
    source, others = images(3), images(3).inputs[:7] + 2
    names = {"first": Standardise(), "flip": RandomFlip(), "second": Standardise()}
    fitted = Compose(names).fit(source, torch.arange(COUNT), lambda own: own, CPU)
    state = fitted.state_dict()
    assert list(state) == ["first.mean", "first.std", "second.mean", "second.std"]
    carried = Compose({name: type(each)() for name, each in names.items()}).with_state(state)
    assert not carried.needs_fitting and Compose(names).needs_fitting
    examples = (others, torch.zeros(7, dtype=torch.int64))
    assert torch.equal(carried.for_evaluation(examples, CPU)[0], fitted.for_evaluation(examples, CPU)[0])
    (error,) = carried.errors(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))[:1]
    assert "statistics are of 3 channels, and the inputs have 5" in error
    with pytest.raises(ValueError, match=r"transforms\.second: no 'mean'"):
        Compose(names).with_state({name: state[name] for name in ("first.mean", "first.std")})


class FitOnly(Normalise):
    """A transform whose statistics cannot be saved."""

    def fit(self, batches: Iterable[torch.Tensor], total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.mean = [float(next(iter(batches)).mean())]


# Refusals


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (RandomCrop(1), "not images"),
        (MaskTokens(0.1, 0), "not tokens"),
        (Normalise([1.0] * 3, [1.0] * 3), "3 means for 5 channels"),
        (FitOnly(0.0, 1.0), "needs state_dict and load_state_dict"),
    ],
)
def test_examples_that_a_transform_cannot_take_are_reported(transform: Transform, message: str):
    (error,) = Compose({"it": transform}).errors(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))
    assert error.startswith("transforms.it: ") and message in error


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomCrop(0),
        lambda: RandomFlip(0.0),
        lambda: RandomRotation(200),
        lambda: CutOut(0),
        lambda: MixUp(0.0),
        lambda: MaskTokens(1.0),
        lambda: Normalise(0.0, 0.0),
        lambda: Normalise([1.0], [1.0, 2.0]),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="valid: "):
        make()
