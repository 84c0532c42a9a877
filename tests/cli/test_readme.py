"""The commands and the example of the README run as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


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


FIRST, *OTHERS = filter(single, commands())


@pytest.mark.parametrize("command", [FIRST, *(pytest.param(other, marks=pytest.mark.long) for other in OTHERS)])
def test_command(command: str, folder: Path):
    """Scripts are started from the source tree, and train into a folder of the test."""
    program, *arguments = shlex.split(command)
    program = str(ROOT / program) if program.startswith("./") else program
    extra = [] if "--cfg" in arguments else [f"run_dir={folder / 'run'}"]
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
            + f" run_dir={folder}/run-{number} launch.nproc_per_node=1"
            for command in several
        ]
        assert "replicas in the silos: [1,1]" in outputs(*[start(command, folder) for command in here])


def test_example_from_python(folder: Path):
    printed = outputs(start("torchrun --nproc-per-node 2 example.py", folder))
    assert "test/accuracy" in printed
    code = (folder / "example.py").read_text().splitlines()
    assert len([line for line in code if line and not line.startswith(("#", "import", "from"))]) <= 20
