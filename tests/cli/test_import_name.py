"""Other packages may be called trainer: the command runs this one, or explains why it cannot."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import HERE, ROOT, Shell
from trainer import __version__

COMMAND = str(ROOT / "trainer/commands/silotrain.py")  # the module of the installed command
THEIRS = "raise SystemExit('this is another trainer')\n"
NET = """
import torch

class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""
RUN = ("launch.nproc_per_node=1", *HERE[1:], "model=custom", "model._target_=net.Net", "rounds=1", "run_dir=run")


def install(site: Path, name: str) -> Path:
    """Install a distribution with a package called trainer into a folder."""
    (site / "trainer").mkdir(parents=True, exist_ok=True)
    (site / "trainer/__init__.py").write_text(THEIRS)
    information = site / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "RECORD").write_text(f"trainer/__init__.py,,\n{information.name}/METADATA,,\n")
    return site


@pytest.mark.parametrize("path", ["trainer.py", pytest.param("trainer/__init__.py", marks=pytest.mark.long)])
def test_another_trainer_hides_nothing(path: str, new_shell: Callable[[], Shell], tmp_path: Path) -> None:
    """One is in the working directory, and another on the Python path: neither the command nor its workers import them.

    The workers find the user's other modules in the working directory.
    """
    shell, site = new_shell(), install(tmp_path / "site", "other-trainer")
    (shell.folder / path).parent.mkdir(exist_ok=True)
    (shell.folder / path).write_text(THEIRS)
    (shell.folder / "net.py").write_text(NET)
    ended = shell.start(COMMAND, *RUN, inside=("env", f"PYTHONPATH={site}")).end()
    note = (
        "the package trainer of other-trainer is installed too: silotrain does not use it, but python -m trainer may\n"
    )
    assert (ended.code, ended.err) == (0, note)
    assert (shell.folder / "run/result.json").exists()


def test_a_package_that_was_installed_over_this_one_is_named(shell: Shell, tmp_path: Path) -> None:
    site = install(tmp_path / "site", "other-trainer")
    (site / "trainer/commands").mkdir()
    command = str(shutil.copy(COMMAND, site / "trainer/commands"))
    ended = shell.start(command, "--version", inside=("env", f"PYTHONPATH={site}")).end()
    assert (ended.code, ended.out) == (2, "")
    first, way_out = ended.err.splitlines()
    assert first == "the package trainer of other-trainer has been installed over silotrain's"
    assert way_out == "  install silotrain in an environment without it"


def test_scripts_train_runs_this_package(shell: Shell, tmp_path: Path) -> None:
    """It is run in a source tree whose virtual environment is this one."""
    site, tree = install(tmp_path / "site", "other-trainer"), tmp_path / "tree"
    (tree / "scripts").mkdir(parents=True)
    (tree / ".venv/bin").mkdir(parents=True)
    for name in ("trainer", "conf"):
        (tree / name).symlink_to(ROOT / name)
    programs = {".venv/bin/python": f'#!/bin/sh\nexec {sys.executable} "$@"\n', "scripts/setup": "#!/bin/sh\n"}
    for name, text in programs.items():
        (tree / name).write_text(text)
        (tree / name).chmod(0o755)
    shutil.copy(COMMAND, tree)
    shutil.copy(ROOT / "scripts/train", tree / "scripts")
    (shell.folder / "trainer.py").write_text(THEIRS)
    start = f"import os; os.execv({str(tree / 'scripts/train')!r}, ['train', '--version'])"
    ended = shell.start("-c", start, inside=("env", f"PYTHONPATH={site}")).end()
    assert (ended.code, ended.out) == (0, f"silotrain {__version__}\n"), ended.err
