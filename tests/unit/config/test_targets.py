"""Targets of a configuration that another process has sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config.compose import compose_tree
from trainer.config.groups import SEARCH_PATH
from trainer.config.targets import check_targets

OVERRIDES = ["model=custom", "model._target_=own.Net", "+model.width=4", "algorithm=fedavg", "transforms=[crop,flip]"]
EVIL = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "trainer.distributed.launch.subprocesses.command_output",
    "own.Net2",
    "own",
    "Net",
    "wn.Net",
]


@pytest.fixture(scope="module")
def composed() -> str:
    """Return the configuration of these overrides as JSON."""
    return json.dumps(compose_tree(OVERRIDES))


def test_what_this_process_would_have_composed_is_accepted(composed: str) -> None:
    tree = json.loads(composed)
    check_targets(tree, OVERRIDES)
    check_targets(tree, [composed])


@pytest.mark.parametrize("target", EVIL)
@pytest.mark.parametrize("place", ["a component", "an argument", "a list"])
def test_a_target_that_nobody_has_named_here_is_refused(composed: str, target: str, place: str) -> None:
    tree: dict[str, Any] = json.loads(composed)
    evil = {"_target_": target, "_args_": [["sh", "-c", "id"]]}
    match place:
        case "a component":
            tree["optimizer"] |= evil
        case "an argument":
            tree["model"]["width"] = evil
        case _:
            tree["data"]["files"] = [[evil]]
    for own in (OVERRIDES, [composed]):
        with pytest.raises(ValueError, match=rf"names {target}, which neither the arguments nor .* refused"):
            check_targets(tree, own)


def test_files_of_the_users_folders_belong_to_this_process(
    composed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("_target_: own.Mine\n")
    tree = json.loads(composed) | {"model": {"_target_": "own.Mine"}}
    with pytest.raises(ValueError, match=r"own\.Mine"):
        check_targets(tree, ["model=mine"])
    monkeypatch.setenv(SEARCH_PATH, f"'file://{tmp_path}'")
    check_targets(tree, ["model=mine"])
    monkeypatch.setenv(SEARCH_PATH, "pkg://mine")
    monkeypatch.syspath_prepend(tmp_path.parent)
    (tmp_path / "__init__.py").touch()
    monkeypatch.setenv(SEARCH_PATH, f"pkg://{tmp_path.name}")
    check_targets(tree, ["model=mine"])
