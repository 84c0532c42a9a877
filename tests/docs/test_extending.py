"""The examples of docs/extending/ run as they are printed.

A block with a title is a file, a line of a `bash` block a command, and a line of a `text` block is among the output.
"""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.command import ROOT, Ended, Shell, work
from tests.docs.example import Example
from trainer.commands.main import main

PAGES = ROOT / "docs/extending"


@pytest.fixture
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("example"), tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory from which this process imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def start(shell: Shell, command: list[str], code: int = 0) -> Ended:
    """Run `python ...` to its end."""
    assert command[0] == "python"
    ended = shell.start(*command[1:]).end()
    assert ended.code == code, ended.out + ended.err
    return ended


def train(ranks, shell: Shell, command: list[str]) -> None:
    """Run `python -m trainer ...` on two live ranks."""
    assert command[:3] == ["python", "-m", "trainer"]
    ranks(2).run(work, command[3:], str(shell.folder))


def test_algorithm(ranks, shell: Shell):
    """A user's file of FedDyn trains to the bits of `algorithm=feddyn`."""
    example = Example(PAGES / "algorithm.md", shell.folder)
    for command in example.commands:
        train(ranks, shell, command)
    ours, theirs = (load_file(shell.folder / f"runs/{name}/model.safetensors") for name in ("mine", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_reader(here: Path, capsys: pytest.CaptureFixture[str]):
    example = Example(PAGES / "reader.md", here)
    (command,) = example.commands
    assert command[:3] == ["python", "-m", "trainer"]
    assert main(command[3:]) == 0
    assert "clients  2" in capsys.readouterr().out
    splits = runpy.run_path("my_reader.py")["read_csv"]("points.csv", owners="site", test=0.34)
    assert splits.label_names == ("down", "up")
    assert len(splits.train) + len(splits.test) == 6
    inputs, targets = splits.train.fetch(torch.arange(len(splits.train)))
    # In points.csv y is above x where the label is `up`.
    assert torch.equal(inputs[:, 1] > inputs[:, 0], targets == 1)
    with pytest.raises(ValueError, match="no column kind\n  valid: site, x, y, label"):
        runpy.run_path("my_reader.py")["read_csv"]("points.csv", targets="kind")


@pytest.mark.long
def test_model(shell: Shell):
    example = Example(PAGES / "model.md", shell.folder)
    (command,) = example.commands
    example.assert_printed(start(shell, command).out)
    assert json.loads((shell.folder / "runs/residual/result.json").read_text())["test/accuracy"] > 0.5


def test_codec(ranks, shell: Shell):
    example = Example(PAGES / "codec.md", shell.folder)
    (command,) = example.commands
    train(ranks, shell, command)
    rounds = [json.loads(line) for line in (shell.folder / "runs/sign/metrics.jsonl").read_text().splitlines()]
    assert [one["bytes_between_silos"] for one in rounds] == [2 * 5388, 4 * 5388]
    codec = runpy.run_path(str(shell.folder / "my_codec.py"))["Sign"]()
    values, decoded = torch.tensor([3.0, -1.0, 2.0] * 11), torch.empty(33)
    packed = torch.empty(codec.encoded_size(33), dtype=torch.uint8)
    codec.encode(values, packed, seed=0)
    codec.decode(packed, decoded)
    assert torch.equal(decoded, torch.tensor([2.0, -2.0, 2.0] * 11))


def test_command(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    example = Example(PAGES / "command.md", here)
    (command,) = example.commands
    monkeypatch.setattr("sys.argv", command[1:])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command[1], run_name="__main__")
    assert ended.value.code == 0
    example.assert_printed(capsys.readouterr().out)


def test_configuration_key(shell: Shell):
    """The edits are applied to a copy of the package, which is then imported from the working directory."""
    for name in ("trainer", "conf"):
        shutil.copytree(ROOT / name, shell.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    example = Example(PAGES / "configuration-key.md", shell.folder)
    for name, edit in example.edits.items():
        path, (context, *added) = shell.folder / name, edit.splitlines()
        text, anchor = path.read_text(), context.removeprefix(" ") + "\n"
        assert text.count(f"\n{anchor}") == 1 and all(line.startswith("+") for line in added)
        path.write_text(text.replace(anchor, anchor + "".join(line[1:] + "\n" for line in added)))
    good, bad = example.commands
    example.assert_printed(start(shell, good).out + start(shell, bad, code=2).err)
