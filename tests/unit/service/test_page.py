"""The page of a model, as HTML: nothing in a card or in a name becomes markup."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.exported import write_linear
from trainer.service.page import HEADERS, SCRIPT, STYLE, csp_hash, render
from trainer.service.version import CARD, DESCRIPTION, ModelDescription, checksums, read_version

CARD_TEXT = """\
---
license: mit
---

# Digits & more

<script>alert(1)</script>

| figure | value |
|---|--:|
| test/accuracy | 0.99 |

[a link](https://example.org) [a bad one](javascript:alert(1))

![curve](curve.svg) ![foreign](https://example.org/a.png) ![not described](secret.svg)
"""


@pytest.fixture
def version(tmp_path: Path) -> tuple[Path, ModelDescription]:
    """Return a version with a card, and its description."""
    folder = write_linear(tmp_path / "digits", 3)
    (folder / CARD).write_text(CARD_TEXT)
    (folder / "curve.svg").write_text("<svg/>")
    described = replace(read_version(folder), label_names=["</script><b>", "one"], sha256=checksums(folder))
    (folder / DESCRIPTION).write_text(described.to_json())
    (folder / "secret.svg").write_text("secret")
    return folder, read_version(folder)


def test_a_card_is_html_without_its_tags_scripts_and_foreign_pictures(
    version: tuple[Path, ModelDescription],
) -> None:
    page = render(*version, models=["digits"])
    article = page[page.index("<article") : page.index("</article>")]
    assert "<h1>Digits &amp; more</h1>" in article and "license" not in article
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in article and "<script" not in article
    assert '<td class="right">0.99</td>' in article and "style=" not in article
    assert '<a href="https://example.org">' in article and 'href="javascript' not in article
    pictures = re.findall(r'<img src="([^"]*)" alt="([^"]*)"', article)
    curve = f"data:image/svg+xml;base64,{base64.b64encode(b'<svg/>').decode()}"
    assert pictures == [(curve, "curve"), ("", "foreign"), ("", "not described")]


def test_the_data_of_the_script_cannot_end_it(version: tuple[Path, ModelDescription]) -> None:
    page = render(*version, models=["digits"])
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    assert data["model"] == "digits" and data["labels"] == ["</script><b>", "one"]
    assert data["inputs"] == [{"name": "inputs", "datatype": "FP32", "shape": [-1, 4]}]
    assert data["example"] == {"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}]}
    assert page.count("<script") == 2


def test_several_models_have_links_to_each_other(version: tuple[Path, ModelDescription]) -> None:
    page = render(*version, models=["digits", "a&b"])
    assert '<a href="?model=digits" aria-current="page">digits</a> <a href="?model=a%26b">a&amp;b</a>' in page


def test_the_policy_allows_the_pages_own_style_and_script_alone(version: tuple[Path, ModelDescription]) -> None:
    page, policy = render(*version, models=["digits"]), HEADERS["Content-Security-Policy"]
    assert f"<style>{STYLE}</style>" in page and f"<script>{SCRIPT}</script>" in page
    assert f"style-src {csp_hash(STYLE)};" in policy and f"script-src {csp_hash(SCRIPT)};" in policy
    assert "default-src 'none'" in policy
