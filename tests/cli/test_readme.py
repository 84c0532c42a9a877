"""The commands and the example of the README run as printed."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.compose import compose_tree

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SPARING = ("launch.threads_per_worker=1",)  # more threads than cores wait for each other


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of this language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Return the lines of the bash blocks, without their comments."""
    lines = (line for block in blocks("bash") for line in block.splitlines())
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    """Start a command as a user of this environment, in a temporary folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(shlex.split(command), cwd=folder, env=environment, **pipes)


def outputs(*processes: subprocess.Popen[str]) -> str:
    """Return the joint output of the processes, which must all succeed."""
    try:
        printed = "\n".join(process.communicate(timeout=120)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()  # if it still runs; its workers end with it
            process.wait()
            assert process.stdout
            process.stdout.close()
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder with the README's module and example in it."""
    for code in blocks("python"):
        (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code)
    return tmp_path


def single(command: str) -> bool:
    return "--nnodes" not in command and "launch.nodes" not in command


@pytest.mark.parametrize("command", commands())
def test_the_overrides_of_a_command_compose(command: str):
    overrides = [argument for argument in shlex.split(command) if "=" in argument and not argument.startswith("--")]
    assert compose_tree(overrides)["rounds"] > 0


@pytest.mark.long
@pytest.mark.parametrize("command", list(filter(single, commands())))
def test_command(command: str, folder: Path):
    """Scripts are started from the source tree, and train into a folder of the test."""
    program, *arguments = shlex.split(command)
    program = str(ROOT / program) if program.startswith("./") else program
    extra = [] if "--cfg" in arguments else [f"run_dir={folder / 'run'}", *SPARING]
    printed = outputs(start(shlex.join([program, *arguments, *extra]), folder))
    assert "test/accuracy" in printed or "_target_" in printed


@pytest.mark.long
def test_commands_of_two_nodes(folder: Path):
    """Both run at once; this machine is both nodes, with one worker each."""
    ours, *torchruns = [command for command in commands() if not single(command)]
    assert len(torchruns) == 2
    for number, several in enumerate([(ours, ours), torchruns]):
        here = [
            command.replace("node0", "127.0.0.1").replace("--nproc-per-node 8", "--nproc-per-node 1")
            + f" run_dir={folder}/run-{number} launch.nproc_per_node=1 {' '.join(SPARING)}"
            for command in several
        ]
        assert "replicas in the silos: [1,1]" in outputs(*[start(command, folder) for command in here])


def metrics_of_example(path: Path) -> dict[str, float]:
    """Run an example on this live rank; return the metrics of its result."""
    return runpy.run_path(str(path))["result"].metrics


def test_example_from_python(ranks, folder: Path):
    example = folder / "example.py"
    code = example.read_text()
    example.write_text(code.replace("rounds=10", "rounds=1").replace("(silos=2)", '(silos=2, device="cpu")'))
    for metrics in ranks(2).run(metrics_of_example, example):
        assert metrics["round"] == 1 and 0 < metrics["test/accuracy"] <= 1
    lines = code.splitlines()
    assert len([line for line in lines if line and not line.startswith(("#", "import", "from"))]) <= 20


@pytest.mark.long
def test_example_from_python_under_torchrun(folder: Path):
    assert "test/accuracy" in outputs(start("torchrun --nproc-per-node 2 example.py", folder))
