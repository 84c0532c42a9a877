"""Rules of the house that ruff and import-linter do not check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

TRAINER = Path(__file__).parents[2] / "trainer"


def test_parameters_are_bound_to_the_vectors_in_one_place():
    """`parameter.data = ...` after DistributedDataParallel has wrapped the module breaks the run silently."""
    binding = {
        str(path.relative_to(TRAINER))
        for path in sorted(TRAINER.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Attribute) and target.attr == "data" for target in node.targets)
        and ast.unparse(node.targets[0]) != "self.data"
    }
    assert binding == {"models/storage.py"}


WITHOUT_TORCH = """
import sys
from trainer.commands.main import main

assert main(["--help"]) == 0 and not {"torch", "hydra", "pydantic"} & sys.modules.keys()
assert main(["rouds=3", "--lr", "0.1"]) == 2 and "torch" not in sys.modules
"""


def test_the_command_line_reads_a_configuration_without_torch():
    """Importing it takes longer than all else that `--help`, an error or the launcher does."""
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=TRAINER.parent, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("did you mean")) == (0, 2), ended.stderr


LAUNCH = """
import sys
from trainer.commands.train.launcher import launch
from trainer.config.compose import compose_tree

tree = compose_tree(["run_dir=" + sys.argv[1], "launch.nproc_per_node=2"])
assert launch(tree, ["-c", "import os, sys; sys.exit(3)"]) == 1
sys.exit("torch" in sys.modules)
"""


def test_the_launcher_of_one_machine_never_imports_torch(tmp_path: Path):
    """Workers start a second sooner. Here they fail, and are started again, three times."""
    command = [sys.executable, "-c", LAUNCH, str(tmp_path / "run")]
    assert subprocess.run(command, cwd=TRAINER.parent, check=False, stderr=subprocess.DEVNULL).returncode == 0


def test_no_run_but_a_member_of_a_federation_needs_its_packages():
    modules = "trainer.commands.train.worker, trainer.commands.doctor.main, trainer.commands.plan.main"
    program = f"import sys; sys.modules.update(cryptography=None, grpc=None); import {modules}"
    ended = subprocess.run([sys.executable, "-c", program], cwd=TRAINER.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
