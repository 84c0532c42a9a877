"""Compare two runs to the last bit: weights, states and metrics, except those that depend on the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import newest_complete
from trainer.checkpoint.format import iter_leaves, part_name
from trainer.checkpoint.run_dir import RunDir
from trainer.loggers import Metrics, read_jsonl

SECTIONS = ("model", "ema", "algorithm", "clients", "residuals")


def differences(alone: Path, disturbed: Path) -> list[str]:
    """Return sentences about the differences between the folders of two runs."""
    return [
        *differing_leaves(final_state(alone / "checkpoints"), final_state(disturbed / "checkpoints")),
        *_of_figures("result.json", RunDir(alone).result(), RunDir(disturbed).result()),
        *_of_files("model.safetensors", alone, disturbed),
        *(_of_files("ema.safetensors", alone, disturbed) if (alone / "ema.safetensors").exists() else ()),
        *_of_rounds(read_jsonl(alone / "metrics.jsonl"), read_jsonl(disturbed / "metrics.jsonl")),
    ]


def final_state(checkpoints: Path) -> dict[str, Any]:
    """Return the leaves of the last checkpoint."""
    saved = newest_complete(checkpoints)
    assert saved, f"{checkpoints} holds no checkpoint"
    parts = range(saved.load("cut")["parts"])
    loaded: dict[str, Any] = {
        part_name(part): {section: saved.load(section, part=part) for section in SECTIONS} for part in parts
    }
    loaded |= {shard: saved.load_shard(shard, "own") for shard in saved.shards}
    return {"round checkpoint": saved.folder.name, **dict(iter_leaves(loaded))}


def differing_leaves(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return sentences about leaves that do not have the same bits in both."""
    return [
        f"checkpoint: {name} differs"
        for name in sorted({*ours, *theirs})
        if name not in ours or name not in theirs or not _are_equal(ours[name], theirs[name])
    ]


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return repr(one) == repr(other)


def _of_files(name: str, alone: Path, disturbed: Path) -> list[str]:
    return [] if (alone / name).read_bytes() == (disturbed / name).read_bytes() else [f"{name} differs"]


def _of_rounds(ours: list[Metrics], theirs: list[Metrics]) -> list[str]:
    rounds = [line["round"] for line in theirs]
    if rounds != [line["round"] for line in ours]:
        return [f"metrics.jsonl: the rounds are {rounds}"]
    found = []
    for one, other in zip(ours, theirs, strict=True):
        found += _of_figures(f"metrics.jsonl, round {one['round']}", one, other)
    return found


def _of_figures(where: str, ours: Metrics, theirs: Metrics) -> list[str]:
    return [
        f"{where}: {name} is {theirs.get(name)}, not {ours.get(name)}"
        for name in sorted({*ours, *theirs})
        if not is_of_the_machine(name) and repr(ours.get(name)) != repr(theirs.get(name))
    ]


def is_of_the_machine(name: str) -> bool:
    """Return whether a metric depends on the clock, or on the load of the machine."""
    return "second" in name or "mfu" in name or name.startswith(("slowest/", "memory/", "system/"))
