"""The run directory: its files besides checkpoints and metrics, and whether a run may resume in it.

outputs/digits-sync/2026-01-31_12-00-00/
  config.yaml    the resolved configuration; its numbers are those of the run
  state.json     running, preempted, finished, bad_input or crashed
  metrics.jsonl  one object a round
  samples.jsonl  texts of a language model, an object for each prompt and round
  model.safetensors  the finished model
  columns.json   of a table with data.columns=: how its columns are encoded
  transforms.safetensors  statistics of the training examples that transforms have measured
  signature.json what the examples are like, for whoever has not the data
  best.safetensors   that of the best saved round, by monitor=
  ema.safetensors    with ema_decay=: the finished one with the average of its weights
  huggingface/       a model of Hugging Face in its own layout; adapter/, merged.safetensors: see docs/adapters.md
  result.json    the metrics of the finished run
  tensorboard/   the same metrics as charts; those of single clients are in tensorboard-clients/
  checkpoints/   see checkpoint/checkpointer.py
  profile/       with run.profile=true: see loop/profiler.py
  console.log    what the run has printed, over all its starts
  logs/          one file a rank, and where the last start began
  lock.json      while a launch owns the folder: see checkpoint/run_lock.py
  sites/         with site.simulate=: the run folder of each site, and what it has printed

It holds clients' figures and states, so only its owner may look into it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml

from trainer.checkpoint.files import sync, write_text
from trainer.checkpoint.run_lock import RunLock
from trainer.utils.disk import DiskError, naming_disk
from trainer.utils.targets import declares
from trainer.utils.text import format_value
from trainer.utils.trees import flatten

if TYPE_CHECKING:  # the launcher does not import torch
    from torch import Tensor

    from trainer.checkpoint.format import LazyTensor, SavedState

Status = Literal["running", "preempted", "finished", "bad_input", "crashed"]

# Keys that may differ when a run resumes: where and how it runs and what it prints, not what it computes.
CHANGEABLE_KEYS = (
    *("run_dir", "require_shared_run_dir", "resume", "name", "run.", "launch.", "metrics.", "checkpoint.", "sample."),
    *("eval.batch_size", "data.root", "data.cache_on_gpu", "channels_last", "max_nonfinite_rounds", "micro_batch_size"),
    *("objective", "allow_unused", "adapter.merge", "silo."),
    *("site.server", "site.listen", "site.certificates", "site.monitor", "site.allow"),
    *("site.min_members", "site.grace_seconds", "site.retry_seconds"),
)

# Names of files of which checkpoints have a fingerprint: they may move, and other data under a name is refused.
FILE_KEYS = (
    *("data.path", "data.files", "data.test_path", "data.validation_path", "data.tokenizer"),
    *("client_sampling.file", "task.teacher"),
)
OURS = ("trainer.data.", "trainer.tasks.")

PRIVATE = 0o700  # of folders that hold clients' data
BLOCK_BYTES = 512  # of st_blocks


class RunDir:
    """The files of one run. Rank 0 writes them, except for the logs and the report of a crash."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.console = path / "console.log"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.profile = path / "profile"
        self.sites = path / "sites"
        # Of the finished run, by what they hold.
        self.models = {
            "last": path / "model.safetensors",
            "best": path / "best.safetensors",
            "ema": path / "ema.safetensors",
        }
        self.lock = RunLock(path)
        self._state = path / "state.json"
        self._result = path / "result.json"
        self.columns = path / "columns.json"
        self._transforms = path / "transforms.safetensors"
        self._signature = path / "signature.json"
        self._logs = path / "logs"

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError if the directory holds anything else than the run that `config` describes."""
        if config["resume"] not in ("auto", "never"):
            RunDir(Path(config["resume"]))._check_source(config)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir={self.path} is a file.\n  choose a new or an empty folder")
        if not self._holds_files():
            return
        if config["resume"] == "never":
            raise ValueError(f"run_dir={self.path} is not empty, and resume=never.\n  choose another run_dir")
        if not self.config.exists():
            raise ValueError(f"run_dir={self.path} holds files, but no run.\n  choose a new or an empty folder")
        if self.has_started():
            # Of a finished run nothing is read again, so that nothing would compare the data.
            _check_same(self.settings(), config, self.path, lambda: not self.has_finished(config["rounds"]))

    def _holds_files(self) -> bool:
        """Return whether the directory holds more than the lock of a launch that begins in it, and its sites."""
        try:
            return self.path.exists() and any(path not in (self.lock.path, self.sites) for path in self.path.iterdir())
        except PermissionError as error:
            raise ValueError(
                f"run_dir={self.path} cannot be read: {error.strerror}.\n  choose another folder"
            ) from error

    def has_started(self) -> bool:
        """Return whether a run has started here, and not only been refused."""
        return self.config.exists() and (self.status() != "bad_input" or self.checkpoints.exists())

    def settings(self) -> Mapping[str, Any]:
        """Return the content of config.yaml."""
        return _read_yaml(self.config)

    def num_clients(self) -> int | None:
        """Return the number of clients of the run in this directory, which stays the same; None without a run."""
        clients = self.settings()["clients"] if self.has_started() else None
        return clients if isinstance(clients, int) else None

    def _check_source(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError if a run that `config` describes cannot start from the checkpoints in this directory."""
        from trainer.checkpoint.resume import newest_complete  # with torch, which the launcher does not import

        if newest_complete(self.checkpoints) is None or not self.config.exists():
            raise ValueError(
                f"resume={self.path} is no run folder with a checkpoint.\n  valid: auto, never, or a run's folder"
            )
        _check_same(self.settings(), config, self.path, lambda: True)

    def create_or_check(self, config: Mapping[str, Any], is_restart: bool = False) -> None:
        """Create the directory, or check that the run in it is the one that `config` describes, and own it.

        Args:
            config: the resolved configuration.
            is_restart: whether the launcher has started the workers again, so that what is there is their own.

        Raises:
            ValueError: it holds something else, another launch owns it, or it cannot be made.
            DiskError: its disk cannot be written to.
        """
        expected = {**config, "resume": "auto"} if is_restart else config
        self.check(expected)
        self.acquire()
        try:
            self.check(expected)  # again: another launch may have had it meanwhile
            for claim in self._logs.glob("failed-*"):
                claim.unlink()
            self.write_config(config)
        except BaseException:
            self.lock.release()
            raise

    def acquire(self) -> None:
        """Own the directory, which is made if there is none, until `lock.release()` or the end of this process.

        Raises:
            ValueError: another launch owns it, or it cannot be made.
            DiskError: its disk cannot be written to.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=PRIVATE, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"run_dir={self.path} cannot be made: {error.strerror}\n  choose another folder"
            ) from error
        with naming_disk(self.path):
            self.lock.acquire()

    def check_not_in_use(self) -> None:
        """Raise ValueError if another process owns the directory."""
        if self.path.exists():
            self.acquire()
            self.lock.release()

    def is_in_use(self) -> bool:
        """Return whether another process owns the directory."""
        try:
            self.check_not_in_use()
        except ValueError:
            return True
        return False

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml, with which a resumed run is compared."""
        self._write(self.config, yaml.safe_dump(dict(config), sort_keys=False))

    def write_columns(self, text: str) -> None:
        """Write columns.json, by which other rows of a table are encoded as those of training were."""
        self._write(self.columns, text)

    def write_signature(self, text: str) -> None:
        """Write signature.json, which says what the examples are like to whoever has not the data."""
        self._write(self._signature, text)

    def signature(self) -> bytes | None:
        """Return the content of signature.json; None if there is none."""
        return self._signature.read_bytes() if self._signature.exists() else None

    def best_so_far(self) -> tuple[int, Callable[[], dict[str, Tensor]]] | None:
        """Return the best round that is saved, and what loads its model without frozen parameters; None if none is."""
        from trainer.checkpoint.model_files import read_all
        from trainer.checkpoint.resume import best_complete, round_order

        saved = best_complete(self.checkpoints)
        return saved and (round_order(saved.folder)[0], lambda: read_all(_global_model(saved, {})))

    def write_transforms(self, statistics: Mapping[str, Tensor]) -> None:
        """Write transforms.safetensors, by which other examples are transformed as those of training were."""
        from trainer.checkpoint.format import write_tensors

        with naming_disk(self._transforms):
            write_tensors(self._transforms, statistics)

    def transforms(self) -> dict[str, Tensor]:
        """Return the statistics that transforms have measured; empty if there are none."""
        from trainer.checkpoint.format import read_tensors

        return read_tensors(self._transforms) if self._transforms.exists() else {}

    def has_finished(self, rounds: int) -> bool:
        """Return whether the run in this directory has trained all these rounds, or has stopped as it was to."""
        return self.status() == "finished" and self.has_result(rounds)

    def has_result(self, rounds: int) -> bool:
        """Return whether the result is there: of these rounds, or of a run that a criterion has ended before them."""
        if not self._result.exists():
            return False
        result = self.result()
        return result["round"] >= rounds or "stopped" in result

    def set_status(self, status: Status, **facts: Any) -> None:
        """Write state.json, from which scripts learn the status of the run."""
        text = json.dumps({"status": status, **facts}, indent=1) + "\n"
        try:
            self._write(self._state, text)
        except DiskError:
            if not _overwrite(self._state, text.encode()):
                raise

    def set_running(self) -> None:
        """Write that this process runs the run."""
        self.set_status("running", host=socket.gethostname(), pid=os.getpid())

    def state_version(self) -> tuple[int, int]:
        """Return what changes whenever state.json is written."""
        try:
            found = self._state.stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    def count_start(self, restarts: int) -> int:
        """Count a start of the workers; return how many in a row, of one launch, have found the same checkpoints."""
        path, found = self._logs / "starts.json", self._checkpoint_names()
        last = _read_json(path, "remove it") if restarts and path.exists() else {}
        starts = last["starts"] + 1 if last.get("checkpoints") == found else 1
        self._write(path, json.dumps({"checkpoints": found, "starts": starts}) + "\n")
        return starts

    def newest_checkpoint(self) -> str:
        """Return the name of the newest checkpoint, for people."""
        return max(self._checkpoint_names(), default="the beginning")

    def _checkpoint_names(self) -> list[str]:
        """Return the names of the round and mid-round checkpoints, complete or not."""
        found = (path for pattern in ("round-*", "round-*/silo-*/step-*") for path in self.checkpoints.glob(pattern))
        return sorted(str(path.relative_to(self.checkpoints)) for path in found)

    def claim_failure(self, scope: str) -> bool:
        """Return whether this process is the first of this start to fail on its node, or in the run, by `scope`."""
        try:
            (self._logs / f"failed-{scope}").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # there is no such folder yet, or the disk takes no file
            return True
        return True

    def state(self) -> dict[str, Any]:
        """Return the content of state.json; empty if there is none."""
        if not self._state.exists():
            return {}
        state = _read_json(self._state, "remove it: the run continues from its checkpoints")
        if state.get("status") not in get_args(Status):
            raise _damaged(self._state, "its status is none", "remove it: the run continues from its checkpoints")
        return state

    def status(self) -> str:
        """Return the status of the run; empty if there is none."""
        return self.state().get("status", "")

    def write_models(
        self, frozen: Mapping[str, Tensor], finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    ) -> None:
        """Write model.safetensors, the global model of the newest checkpoint, by the names of its tensors.

        Also write best.safetensors, that of the best one, and ema.safetensors, the newest model with the average of its
        weights, if the run has them.

        Args:
            frozen: the frozen parameters, which checkpoints do not contain, by all their names.
            finish: makes the tensors to write of those of a model; None: they are written as they are.
        """
        from trainer.checkpoint.model_cut import whole_tensors
        from trainer.checkpoint.model_files import read_all, write_model
        from trainer.checkpoint.resume import best_complete, newest_complete

        saved, best = newest_complete(self.checkpoints), best_complete(self.checkpoints)
        assert saved is not None
        models = {"last": _global_model(saved, frozen)}
        if best is not None:
            models["best"] = _global_model(best, frozen)
        if average := whole_tensors(saved, "ema"):
            models["ema"] = models["last"] | average
        for name, tensors in models.items():
            path = self.models[name]
            with naming_disk(path, "the model is in the newest checkpoint"):
                write_model(path, finish(read_all(tensors)) if finish else tensors)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json; metrics that are not finite become null."""
        infinite = {name for name, value in result.items() if isinstance(value, float) and not math.isfinite(value)}
        finite = {name: None if name in infinite else value for name, value in result.items()}
        self._write(self._result, json.dumps(finite, indent=1) + "\n")

    def result(self) -> dict[str, Any]:
        """Return the metrics of the finished run, with `stopped` if it ended before its last round."""
        remedy = "remove it: the same command writes it again"
        stored = _read_json(self._result, remedy)
        if "round" not in stored:
            raise _damaged(self._result, "it has no round", remedy)
        return {name: math.nan if value is None else value for name, value in stored.items()}

    def start_log(self, rank: int) -> None:
        """Append this process's log records to logs/rank-<rank>.log."""
        with naming_disk(self._logs):
            self._logs.mkdir(parents=True, exist_ok=True)
            handler = _LogFile(self._logs / f"rank-{rank}.log", encoding="utf-8", errors="backslashreplace")
        layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(handlers=[handler], format=layout, level=logging.INFO, force=True)

    def sync_metrics(self) -> None:
        """Have the metrics of all rounds on the disk, which power loss takes from a file that is only written."""
        charts = [path for folder in self.path.glob("tensorboard*/") for path in (*folder.iterdir(), folder)]
        for path in (self.metrics, *charts, self.path):
            if path.exists():
                sync(path)

    def _write(self, path: Path, text: str) -> None:
        with naming_disk(path):
            write_text(path, text)


def _global_model(saved: SavedState, frozen: Mapping[str, Tensor]) -> dict[str, Tensor | LazyTensor]:
    """Return the global model of a round checkpoint, with its frozen parameters."""
    from trainer.checkpoint.model_cut import whole_tensors

    # Sorted: the file is the same whichever replicas wrote the checkpoint.
    model = dict(sorted({**frozen, **whole_tensors(saved, "model")}.items()))
    # Tensors that belong to a rank are all those of the first one.
    local = saved.load_shard(saved.shards[0], "own/local")
    return model | {name: tensor for name, tensor in local.items() if name in model}


class _LogFile(logging.FileHandler):
    """A log whose own errors are not reported: a disk without room ends the run where something is lost."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (of logging)
        """Drop the record."""


def _overwrite(path: Path, content: bytes) -> bool:
    """Write over an existing file in its own place on the disk, if it has room; return whether it had."""
    try:
        with open(path, "r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_blocks * BLOCK_BYTES < len(content):
                return False
            file.write(content)
            file.truncate()
    except OSError:
        return False
    return True


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, str(error), remedy) from error
    if not isinstance(stored, dict):
        raise _damaged(path, "it is no mapping", remedy)
    return stored


def _damaged(path: Path, reason: str, remedy: str) -> ValueError:
    return ValueError(f"{path} is damaged: {reason}.\n  restore it from a copy, or {remedy}")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    remedy = "choose another run_dir"
    try:
        stored = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _damaged(path, " ".join(str(error).split()), remedy) from error
    if not isinstance(stored, dict):
        raise _damaged(path, "it is no mapping", remedy)
    return stored


def _check_same(
    stored: Mapping[str, Any], config: Mapping[str, Any], path: Path, reads_data: Callable[[], bool]
) -> None:
    if unknown := sorted(stored.keys() - config.keys()):
        raise ValueError(
            f"{path} was written by an older version: its config.yaml has {', '.join(unknown)}.\n"
            "  choose another run_dir"
        )
    if lost := sorted(config.keys() - stored.keys()):
        raise ValueError(
            f"{path}/config.yaml is cut off, or was written by an older version: it has no {', '.join(lost)}.\n"
            "  restore it from a copy, or choose another run_dir"
        )
    old, new = flatten(stored), flatten(config)
    if new["clients"] == "auto":
        new["clients"] = old["clients"]  # fixed when the run was begun
    if new["rounds"] > old["rounds"] and declares(new["schedule._target_"], "is_constant"):
        old.pop("rounds")  # more rounds change nothing in those that were run, if no schedule counts them

    def may_move(key: str) -> bool:
        # The fingerprint covers all that these readers return; of what a user's own returns it may cover less.
        is_ours = key in FILE_KEYS and new[f"{key.partition('.')[0]}._target_"].startswith(OURS)
        return is_ours and reads_data()

    changed = [
        f"{key}={format_value(new.get(key))}, but the run in this folder has {format_value(old.get(key))}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
        and not key.startswith(CHANGEABLE_KEYS)
        and not may_move(key)
        and not (key == "rounds" and key not in old)
    ]
    if changed:
        raise ValueError("\n".join(changed) + f"\n  resume the run as it was, or choose another run_dir than {path}")
