"""The messages of meetings as files of the coordinator: what a run needs that is killed and started again.

meetings/
  members.json                       what the members have said of their data
  rounds/12/training/                a meeting
    berlin.safetensors               what a member has brought
    _result.safetensors              what came of it
  _state.safetensors                 for members that are late
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from trainer.checkpoint.files import sync
from trainer.federation.messages import Message, MessageError, PrivateFile, read_header, read_message, write_message
from trainer.utils.disk import naming_disk

KEY = re.compile(r"[a-z]+(/[a-z0-9-]{1,64}){0,3}")
ROUND = re.compile(r"rounds/(\d+)/.*")
OF_END = "end/"  # begins the keys of meetings to which a member comes when it has the result of the run
OF_ALL = "start/"  # begins the keys of meetings that end with no member missing: they measure all examples
SUFFIX, PARTIAL = ".safetensors", ".partial"
RESULT, STATE = f"_result{SUFFIX}", f"_state{SUFFIX}"  # no member's name begins so


def round_of(key: str) -> int | None:
    """Return the round to which a meeting belongs; None if it belongs to the start or the end of the run."""
    found = ROUND.fullmatch(key)
    return int(found[1]) if found else None


class Spool:
    """The files of all meetings.

    Args:
        folder: of these files alone; it is made, for its owner alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with naming_disk(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for aside in folder.rglob(f".*{PARTIAL}"):
            aside.unlink()

    def meetings(self) -> list[str]:
        """Return the keys of the meetings that have files."""
        return sorted({str(path.parent.relative_to(self.folder)) for path in self.folder.glob(f"*/**/*{SUFFIX}")})

    def members(self, key: str) -> set[str]:
        """Return the names of those whose messages are there."""
        return {path.stem for path in self._folder(key).glob(f"*{SUFFIX}") if path.name != RESULT}

    @contextmanager
    def receiving(self, key: str, name: str) -> Iterator[BinaryIO]:
        """Yield a file for the message of a member, which is there when the block ends without an error."""
        folder = self._folder(key)
        aside = folder / f".{name}.{threading.get_ident()}{PARTIAL}"
        with naming_disk(self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                with PrivateFile(aside) as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                read_message(aside)  # the library that will read it has rules of its own
                aside.rename(folder / f"{name}{SUFFIX}")
            finally:
                with suppress(FileNotFoundError):
                    aside.unlink()
            sync(folder)

    def message(self, key: str, name: str) -> Message:
        """Return the message of a member, whose tensors are mapped."""
        return read_message(self._folder(key) / f"{name}{SUFFIX}")

    def put_result(self, key: str, result: Message) -> Path:
        """Write the result of a meeting. It may be read before `sync` has it on the disk."""
        with naming_disk(self.folder):
            self._folder(key).mkdir(mode=0o700, parents=True, exist_ok=True)
            write_message(self.result(key), result)
        return self.result(key)

    def result(self, key: str) -> Path:
        """Return the file of the result of a meeting."""
        return self._folder(key) / RESULT

    def result_header(self, key: str) -> dict[str, object] | None:
        """Return the header of the result of a meeting; None if there is no result."""
        return read_header(self.result(key)) if self.result(key).exists() else None

    def put_state(self, state: Message) -> Path:
        """Write the state for members that are late, in place of an older one."""
        with naming_disk(self.folder):
            write_message(self.folder / STATE, state)
        return self.folder / STATE

    def forget_brought(self, key: str) -> None:
        """Remove what members have brought to a meeting."""
        for name in self.members(key):
            (self._folder(key) / f"{name}{SUFFIX}").unlink()

    def forget(self, key: str) -> None:
        """Remove a meeting."""
        shutil.rmtree(self._folder(key), ignore_errors=True)
        with suppress(OSError):  # others of the round are left
            self._folder(key).parent.rmdir()

    def remove(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.folder)

    def _folder(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise MessageError(f"{key[:80]} is no key of a meeting")
        return self.folder / key
