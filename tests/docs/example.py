"""The blocks of a page: files, edits, commands, and output."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def joined(text: str) -> list[str]:
    """Return the commands of a block, of which some are continued on the next line."""
    return text.replace("\\\n", "").splitlines()


class Example:
    """The blocks of a page, whose files are written to a folder."""

    def __init__(self, page: Path, folder: Path):
        blocks = BLOCK.findall(page.read_text())
        self.folder = folder
        self.files = {title: text for language, title, text in blocks if title and language != "diff"}
        self.edits = {title: text for language, title, text in blocks if language == "diff"}
        self.commands = [
            shlex.split(line) for language, _, text in blocks if language == "bash" for line in joined(text)
        ]
        self.printed = [line for language, _, text in blocks if language == "text" for line in text.splitlines()]
        for name, text in self.files.items():
            (folder / name).write_text(text)

    def assert_printed(self, output: str) -> None:
        """Fail unless the output has all lines that the page promises."""
        assert self.printed
        assert not [line for line in self.printed if line not in output], output
