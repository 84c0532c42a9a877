"""The GPU benchmark runs without a GPU: both sides of every model, and its output."""

from __future__ import annotations

import pytest

from scripts.bench.gpu.__main__ import MODELS, main
from scripts.bench.gpu.cases import cases, resnet18


@pytest.mark.parametrize("name", MODELS)
def test_both_sides_train(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--tiny", "--windows", "1", "--no-memory"])
    message = capsys.readouterr().out
    assert f"\n{name} " in message and "by hand" in message and "ratio" in message
    assert ("measured_mfu" in message) == ("tokens_per_second" in message) == (name == "gpt")


@pytest.mark.parametrize("side", ["ours", "by-hand"])
def test_a_side_alone_tells_its_memory(side: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["mlp", "--tiny", "--alone", side])
    assert float(capsys.readouterr().out) > 1e6


def test_what_is_no_case_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bert"])
    assert "unknown: bert; valid: gpt, resnet, mlp, combination" in capsys.readouterr().err


def test_without_a_case_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "gpt, resnet, mlp, combination, or say --all" in capsys.readouterr().err


def test_the_network_of_18_layers_has_as_many_parameters_as_its_convolutions_norms_and_last_layer() -> None:
    """By hand: a convolution of 3 to 64, four of 64; in each wider stage, one from half as many channels and three."""
    wider = sum(9 * (width // 2 * width + 3 * width**2) + 4 * 2 * width for width in (128, 256, 512))
    first = 9 * 3 * 64 + 2 * 64 + 4 * (9 * 64**2 + 2 * 64)
    assert sum(parameter.numel() for parameter in resnet18().parameters()) == first + wider + 512 * 10 + 10


def test_every_case_is_there_in_both_sizes() -> None:
    assert list(cases(tiny=True)) == list(cases(tiny=False)) == list(MODELS)
