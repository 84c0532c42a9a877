"""Hooks of mkdocs: pages from outside docs/, and the links between them and those inside."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "CHANGELOG.md": "changelog.md",
    "slurm/README.md": "slurm.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
# Fenced blocks come first in the alternation, so that nothing inside them is taken for a link.
LINK = re.compile(r"```.*?```|(!?)\[([^\]]*)\]\(([^)\s]+)\)", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite relative links as the site needs them. A link to a file that is no page becomes its text."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def rewrite(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if target is None or "://" in target or target.startswith(("#", "mailto:")):
            return match.group()
        path, hash, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / path).exists():
            return match.group()  # mkdocs reports it
        if path not in PAGES and not path.startswith("docs/"):
            return text
        target = posixpath.relpath(PAGES.get(path, path.removeprefix("docs/")), posixpath.dirname(here) or ".")
        return f"{image}[{text}]({target}{hash}{anchor})"

    return LINK.sub(rewrite, markdown)
