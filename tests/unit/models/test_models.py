"""Models: shapes, published parameter counts, learning, and empty batches, which replicas may have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trainer.models import CNN, GPT, LSTM, MLP, DigitsCNN, Logistic, ResNet, ViT, describe_model

images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
grey = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
text = torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(0))

SMALL: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[int, ...]]] = {
    "mlp": (lambda: MLP(hidden=8), grey, (10,)),
    "logistic": (Logistic, grey, (10,)),
    "cnn": (CNN, grey, (10,)),
    "digits_cnn": (lambda: DigitsCNN(norm="group"), grey[..., :8, :8], (10,)),
    "resnet": (lambda: ResNet(classes=7, depth=8, width=8), images, (7,)),
    "resnet_batch": (lambda: ResNet(depth=14, width=8, norm="batch"), images, (10,)),
    "resnet_grey": (lambda: ResNet(depth=8, width=8, channels=1), grey, (10,)),
    "vit": (lambda: ViT(classes=5, width=32, layers=2, dropout=0.1), images, (5,)),
    "vit_grey": (lambda: ViT(size=28, patch=7, width=32, layers=1, channels=1), grey, (10,)),
    "lstm": (lambda: LSTM(width=16), text, (12, 256)),
    "gpt": (lambda: GPT(width=32, layers=1), text, (12, 256)),
}
small = pytest.mark.parametrize("name", SMALL)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@small
def test_an_example_more_or_less_changes_nothing_but_the_number_of_outputs(name: str):
    make, inputs, shape = SMALL[name]
    module = make().eval()
    outputs = module(inputs)
    assert outputs.shape == (4, *shape)
    torch.testing.assert_close(module(inputs[:2]), outputs[:2], rtol=1e-4, atol=1e-5)
    assert module(inputs[:0]).shape == (0, *shape)


@small
def test_two_steps_lower_the_loss(name: str):
    make, inputs, _ = SMALL[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = make()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        outputs = module(inputs)
        targets = inputs if inputs.dtype == torch.int64 else torch.arange(4)
        loss = nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


# In millions: He et al. 2016, table 6, with two digits.
RESNETS = {20: (269_722, 0.27), 32: (464_154, 0.46), 44: (658_586, 0.66), 56: (853_018, 0.85), 110: (1_727_962, 1.7)}


@pytest.mark.parametrize("depth", RESNETS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnets_have_as_many_parameters_as_published(depth: int, norm: str):
    exact, millions = RESNETS[depth]
    assert parameters(ResNet(depth=depth, norm=norm)) == exact  # pyright: ignore[reportArgumentType]
    assert float(f"{exact / 1e6:.2g}") == millions


def test_others_have_as_many_parameters_as_published():
    """The 2NN and CNN of McMahan et al. 2017; DeiT-Ti and DeiT-S; the LSTM has 18 less than their 866,578."""
    assert (parameters(MLP()), parameters(CNN())) == (199_210, 1_663_370)
    deit = {"classes": 1000, "size": 224, "patch": 16, "layers": 12}
    assert parameters(ViT(width=192, heads=3, **deit)) == 5_717_416
    assert parameters(ViT(width=384, heads=6, **deit)) == 22_050_664
    assert parameters(LSTM()) == 866_560


def test_a_resnet_with_group_norm_has_no_statistics():
    assert not list(ResNet(depth=8).buffers())
    assert list(ResNet(depth=8, norm="batch").buffers())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(depth=18), r"model.depth=18\n  valid: 6 n \+ 2"),
        (lambda: ViT(size=28, patch=5), "model.size=28 is not a multiple of model.patch=5"),
        (lambda: ViT(width=30, heads=4), "model.width=30 is not a multiple of model.heads=4"),
        (lambda: LSTM(layers=1, dropout=0.1), "model.layers=1"),
    ],
)
def test_inconsistent_sizes_are_refused(make: Callable[[], nn.Module], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_texts_in_a_window_do_not_see_each_other():
    """The logits of packed texts are those of each text alone, whatever the other ones are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GPT(vocabulary=50, length=16, layers=2, heads=2, width=16).double().eval()
    texts = [torch.arange(length) * 7 % 50 for length in (5, 1, 8)]
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    packed = module(input_ids=torch.cat(texts)[None], position_ids=positions[None])[0]
    alone = torch.cat([module(text[None])[0] for text in texts])
    assert torch.allclose(packed, alone, rtol=1e-12, atol=1e-12)


def test_the_summary_counts_every_parameter_once():
    """The tied output of a GPT has no row; a module with a single child is replaced by it."""
    module = GPT(vocabulary=256, length=128, layers=1, heads=2, width=32)
    module.tokens.requires_grad_(False)
    assert describe_model(module).splitlines() == [
        f"GPT, {parameters(module):,} parameters, 8,192 frozen",
        "  tokens      8,192  Embedding, frozen",
        "  positions   4,096  Embedding",
        "  blocks     12,704  ModuleList",
        "  norm           64  LayerNorm",
    ]
    assert describe_model(MLP()).splitlines()[1:] == [
        "  layers.1  157,000  Linear",
        "  layers.3   40,200  Linear",
        "  layers.5    2,010  Linear",
    ]
    assert describe_model(Logistic()) == "Logistic, 7,850 parameters"
    many = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    assert describe_model(many).splitlines()[-2:] == ["  11  2  Linear", "  ... and 8 more"]
