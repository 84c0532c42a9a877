"""The models of a folder, and the versions of them that are served: the newest whole ones, followed while they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson

from trainer.service.engine import Engine, load_engine
from trainer.service.errors import InferenceError, NotFoundError
from trainer.service.meters import Meters, VersionMeters
from trainer.service.protocol import Signature, decode_request, from_list
from trainer.service.version import (
    DESCRIPTION,
    EXAMPLE_REQUEST,
    EXAMPLE_RESPONSE,
    ModelDescription,
    read_version,
    version_numbers,
)

SERVED = 2  # versions of a model: the newest, and the one before it for clients that ask for it by number
TOLERANCE = 0.01  # of the largest output of the example: other processors compute the last digits of int8 otherwise

log = logging.getLogger(__name__)

Stamp = frozenset[tuple[str, int, int]]  # name, size and time of each file of a version


@dataclass(frozen=True, eq=False)
class ServedVersion:
    """A version that is loaded."""

    model: str
    number: int
    folder: Path
    stamp: Stamp
    description: ModelDescription
    engine: Engine
    meters: VersionMeters

    @cached_property
    def signature(self) -> Signature:
        """Its inputs and outputs, to check requests by."""
        return Signature(self.description)

    def check_example(self) -> None:
        """Check that the example of the version is answered as it was where the version was exported.

        Raises:
            ValueError: it is not.
        """
        signature, folder = self.signature, self.folder
        request, response = (folder / name for name in (EXAMPLE_REQUEST, EXAMPLE_RESPONSE))
        if not {request.name, response.name} <= self.description.sha256.keys():
            return
        try:
            answer = self.engine.run(decode_request(request.read_bytes(), None, signature).inputs)
            expected = {tensor["name"]: _tensor(tensor) for tensor in orjson.loads(response.read_bytes())["outputs"]}
        except (InferenceError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}: its example fails: {error}") from error
        for name, tensor in expected.items():
            if name not in answer or not _is_close(answer[name], tensor):
                raise ValueError(f"{folder}: {name} of its example is another one here")


class Repository:
    """The models of a folder.

    Args:
        root: MODELS, one model in it, or one version of a model.
        threads: of an operation; None: one for each core.
        meters: where the versions are counted.

    Attributes:
        models: the served versions of each model by number, the newest first. It is replaced, never changed.
    """

    def __init__(self, root: Path, threads: int | None, meters: Meters):
        self.models: Mapping[str, Mapping[int, ServedVersion]] = {}
        self._root, self._threads, self.meters = root, threads, meters
        self._refused: dict[Path, Stamp] = {}

    def find(self, model: str, number: str = "") -> ServedVersion:
        """Return a version that is served, by default the newest.

        Raises:
            NotFoundError: there is no such model, or this version is not one of the newest.
        """
        versions = self.models.get(model)
        if versions is None:
            raise NotFoundError(f"model: got {model[:80]!r}, wanted {' or '.join(self.models) or 'nothing: none is'}")
        for version in versions.values():
            if number in ("", str(version.number)):
                return version
        raise NotFoundError(f"version of {model}: got {number[:80]!r}, wanted {' or '.join(map(str, versions))}")

    async def follow(self, seconds: float = 1.0) -> None:
        """Look for new versions for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await asyncio.to_thread(self.refresh)
            except OSError as error:  # a shared disk that is away comes back
                log.warning("%s cannot be read: %s", self._root, error)

    def refresh(self) -> None:
        """Load the versions that are new, and serve them in place of older ones.

        Whatever is served stays so until something newer, or older where the newer one was removed, is whole.
        """
        for model, folders in self._folders().items():
            now = self.models.get(model, {})
            served = dict[int, ServedVersion]()
            for number in sorted(folders, reverse=True):
                version = self._version(model, number, folders[number], now.get(number))
                if version is not None and len(served) < SERVED:
                    served[number] = version
                if len(served) == SERVED:
                    break
            if served and list(served.values()) != list(now.values()):
                newest = next(iter(served.values()))
                self.meters.newest(model, newest.number, newest.description)
                log.info("%s: version %s", model, " and ".join(map(str, served)))
                self.models = {**self.models, model: served}

    def _folders(self) -> dict[str, dict[int, Path]]:
        """Return the folders that may be versions, by model and number."""
        root = self._root.resolve()
        if (root / DESCRIPTION).is_file():
            return {root.parent.name: {int(root.name) if root.name.isdecimal() else 1: root}}
        if numbers := version_numbers(root):
            return {root.name: {number: root / str(number) for number in numbers}}
        models = (path for path in sorted(root.iterdir()) if path.is_dir())
        return {model.name: {number: model / str(number) for number in version_numbers(model)} for model in models}

    def _version(self, model: str, number: int, folder: Path, now: ServedVersion | None) -> ServedVersion | None:
        """Return a version, loaded if it is new or another one by now; what was loaded if it is damaged."""
        try:
            stamp = _stamp(folder)
        except FileNotFoundError:  # it was removed meanwhile
            return now
        if (now is not None and now.stamp == stamp) or self._refused.get(folder) == stamp:
            return now
        try:
            description = read_version(folder)
            engine = load_engine(folder, description, self._threads)
            meters = self.meters.of_version(model, number)
            version = ServedVersion(model, number, folder, stamp, description, engine, meters)
            version.check_example()
        except Exception as error:  # whatever is wrong with a version, the others are served
            if not folder.is_dir():
                return now
            log.warning("%s: version %s is passed over: %s", model, number, error)
            self._refused[folder] = stamp
            self.meters.refused.labels(model).inc()
            return now
        return version


def _stamp(folder: Path) -> Stamp:
    stats = ((path.name, path.stat()) for path in folder.iterdir())
    return frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _tensor(written: Mapping[str, object]) -> np.ndarray:
    name, datatype, shape = (written[key] for key in ("name", "datatype", "shape"))
    return from_list(name, written["data"], datatype, shape)  # pyright: ignore[reportArgumentType] (of our own files)


def _is_close(tensor: np.ndarray, expected: np.ndarray) -> bool:
    """Whether an output is as expected. Whole numbers may differ: labels do where two scores are nearly equal."""
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        return False
    if expected.dtype.kind != "f":
        return True
    limit = TOLERANCE * (1e-3 + float(np.abs(expected).max(initial=0)))
    return bool(np.allclose(tensor, expected, rtol=0, atol=limit, equal_nan=True))
