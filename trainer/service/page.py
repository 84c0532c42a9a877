"""The page of a model: its card, how it is asked now, and a form to try it. It needs no network but the server's."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from markdown_it import MarkdownIt
from markdown_it.token import Token

from trainer.service.version import CARD, COLUMNS, EXAMPLE_REQUEST, ModelDescription

PACKAGE_DIR = Path(__file__).parent
STYLE, SCRIPT = ((PACKAGE_DIR / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
TEMPLATE = Template((PACKAGE_DIR / "page.html").read_text(encoding="utf-8"))

PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # of a model card: YAML for Hugging Face


def csp_hash(text: str) -> str:
    """Return how a Content-Security-Policy names a style or a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# Nothing but this style and this script has an effect, whatever a card holds, and nothing is asked of other servers.
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src {csp_hash(STYLE)}; script-src {csp_hash(SCRIPT)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def render(folder: Path, description: ModelDescription, models: Sequence[str]) -> str:
    """Return the page of a version, as HTML.

    Args:
        folder: of the version, MODELS/<name>/<version>.
        description: of the version; only files that it describes are read.
        models: the names of all models of the server, each of which has a page.
    """
    name = folder.parent.name
    data = {
        "model": name,
        "inputs": [{"name": each.name, "datatype": each.datatype, "shape": each.shape} for each in description.inputs],
        "labels": description.label_names,
        "example": _json_file(folder, EXAMPLE_REQUEST, description),
        "columns": _json_file(folder, COLUMNS, description),
    }
    return TEMPLATE.substitute(
        title=escape(name),
        style=STYLE,
        models=_links(name, models),
        card=_card(folder, description),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        script=SCRIPT,
    )


def _json_file(folder: Path, name: str, description: ModelDescription) -> Any:
    return json.loads((folder / name).read_bytes()) if name in description.sha256 else None


def _links(name: str, models: Sequence[str]) -> str:
    """Return links to the pages of all models, if there are several."""
    if len(models) < 2:
        return ""
    current = ' aria-current="page"'
    links = (f'<a href="?model={quote(each, safe="")}"{current * (each == name)}>{escape(each)}</a>' for each in models)
    return f'<nav aria-label="Models">{" ".join(links)}</nav>'


def _card(folder: Path, description: ModelDescription) -> str:
    """Return the model card as HTML. Tags that it holds are shown as text, and pictures are those of the version."""
    if CARD not in description.sha256:
        return ""
    text = FRONT_MATTER.sub("", (folder / CARD).read_text(encoding="utf-8"), count=1)
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    for token in tokens:
        if alignment := token.attrs.pop("style", None):  # of a cell; a style in a tag would have no effect
            token.attrs["class"] = str(alignment).removeprefix("text-align:")
        for child in token.children or ():
            if child.type == "image":
                _embed(child, folder, description)
    return markdown.renderer.render(tokens, markdown.options, {})


def _embed(image: Token, folder: Path, description: ModelDescription) -> None:
    """Put a picture of the version into the page; others are left out, as the page asks nobody else."""
    source = str(image.attrs["src"])
    kind = PICTURES.get(Path(source).suffix)
    image.attrs["src"] = ""
    if kind and source in description.sha256:
        content = base64.b64encode((folder / source).read_bytes()).decode()
        image.attrs["src"] = f"data:{kind};base64,{content}"
