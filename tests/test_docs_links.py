"""Every link of the documentation leads to a file that exists, and to a heading in it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import PROJECT
from markdown_it import MarkdownIt
from markdown_it.token import Token

TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = [*(PROJECT / name for name in TOP), *sorted((PROJECT / "docs").rglob("*.md"))]
PARSER = MarkdownIt("commonmark").enable("table")


def inlines(text: str) -> Iterator[tuple[Token, Token]]:
    """Yield each run of text with the token that opens what it stands in."""
    tokens = PARSER.parse(text)
    for opening, token in itertools.pairwise(tokens):
        if token.type == "inline":
            yield opening, token


def targets(text: str) -> list[str]:
    """Return the targets of all links and images, those to the web left out."""
    found = [
        str(child.attrs.get("href", child.attrs.get("src", "")))
        for _, inline in inlines(text)
        for child in inline.children or ()
        if child.type in ("link_open", "image")
    ]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Return a page's anchors, by GitHub's rule: lower case, no punctuation, a hyphen for each space."""
    slugs: dict[str, int] = {}
    for opening, inline in inlines(text):
        if opening.type == "heading_open":
            said = "".join(child.content for child in inline.children or ())
            slug = re.sub(r"[^\w\- ]", "", said.strip().lower()).replace(" ", "-")
            slugs[slug] = slugs.get(slug, 0) + 1
    repeated = {f"{slug}-{n}" for slug, count in slugs.items() for n in range(1, count)}
    return {*slugs, *repeated, *re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}


def broken(page: Path) -> list[str]:
    wrong = []
    text = page.read_text(encoding="utf-8")
    for target in targets(text):
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            wrong.append(f"{target}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_links_lead_somewhere(page):
    assert not broken(page)


def test_a_link_to_nowhere_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# One `two` – three\n\n## Same\n\n## Same\n")
    links = ["b.md#one-two--three", "b.md#same-1", "c.md", "b.md#four", "https://x.org/y", "#here"]
    page = tmp_path / "a.md"
    page.write_text("# Here\n\n" + "\n".join(f"[x]({link})" for link in links) + "\n\n`[not](a.link)`\n")
    assert broken(page) == ["c.md: no such file", "b.md#four: no such heading"]
