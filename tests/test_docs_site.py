"""The site: built strictly and without a network, and looked at by a browser on a phone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from conftest import PROJECT

for module in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[docs]'")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REPOSITORY = "https://github.com/lm-eval-lora-ensemble/lm-eval-lora-ensemble"

BUILD = """
import runpy, socket, sys
def refuse(*_, **__):
    raise OSError("the build asked for the network")
socket.socket.connect = socket.getaddrinfo = refuse
sys.argv = ["mkdocs", "build", "--strict", "--site-dir", sys.argv[1]]
runpy.run_module("mkdocs", run_name="__main__")
"""


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BUILD, str(site)],
        cwd=project,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "site"
    done = build(PROJECT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def text_of(site: Path, page: str) -> str:
    return (site / page).read_text(encoding="utf-8")


def article(site: Path, page: str) -> str:
    """Return the HTML of what the page says, without the navigation."""
    return text_of(site, page).partition("<article")[2].partition("</article>")[0]


def pages(site: Path) -> list[str]:
    return sorted(
        path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html"
    )


def test_every_page_is_there_and_no_script_of_ours(site):
    written = {
        path.relative_to(PROJECT / "docs").with_suffix(".html") for path in (PROJECT / "docs").rglob("*.md")
    }
    assert {Path(page) for page in pages(site)} == written | {Path("tutorial.html")}
    assert not [path for path in site.rglob("*") if path.suffix in (".py", ".sh", ".md")]


def test_no_page_loads_anything_from_elsewhere(site):
    for page in pages(site):
        tags = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\S*|<link\b[^>]*>", text_of(site, page))
        for tag in tags:
            assert "://" not in tag or 'rel="canonical"' in tag, f"{page}: {tag}"


def test_formulas_are_drawn(site):
    page = article(site, "metrics.html")
    written = (PROJECT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page.count("<math ") == len(re.findall(r"(?<!\\)\$[^$\n]+\$", written)) > 5
    for name in pages(site):
        assert "arithmatex" not in article(site, name)
        assert "\\frac" not in article(site, name)


def test_docstrings_are_read_as_they_are_meant(site):
    for name in ("reference/api.html", "reference/functions.html"):
        page = article(site, name)
        assert not re.search(r":(?:class|func|data|meth|mod):", page), "a role of Sphinx is left"
        assert "<blockquote>" not in page, "an example was taken for a quotation"
        assert page.count(">>>") + page.count("&gt;&gt;&gt;") > 10
    link = 'href="#lm_eval_lora_ensemble.analysis.run.Run"'
    assert link in article(site, "reference/api.html"), "types lead to their own description"


def test_lists_are_lists(site):
    """GitHub sees one without an empty line before it; the site's parser does not."""
    for name in pages(site):
        for paragraph in re.findall(r"<p>(.*?)</p>", article(site, name), re.DOTALL):
            assert not re.search(r"\n(?:[*-] |\d+\. )", unescape(paragraph)), f"{name}: {paragraph[:200]}"


def test_links_out_of_docs_lead_to_the_repository(site):
    assert f'href="{REPOSITORY}/blob/main/benchmarks/RESULTS.md"' in article(site, "performance.html")
    assert f'href="{REPOSITORY}/blob/main/CHANGELOG.md"' in article(site, "reference/api.html")
    assert 'href="tutorial.html"' in article(site, "index.html")
    assert 'href="tutorial.ipynb"' in article(site, "tutorial.html") and (site / "tutorial.ipynb").is_file()


def test_a_link_to_nowhere_stops_the_build(tmp_path):
    for name in ("docs", "lm_eval_lora_ensemble"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a", encoding="utf-8") as page:
        page.write("\n[no page](nowhere.md), [no heading](metrics.md#nowhere), [no file](../nowhere.py)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for target in ("nowhere.md", "metrics.md#nowhere", "../nowhere.py"):
        assert f"'{target}'" in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_pages_fit_a_phone_and_ask_nobody(site):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True).new_page()
        page.on("request", lambda request: asked.append(request.url))
        for name in pages(site):
            page.goto((site / name).as_uri(), wait_until="load")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is too wide"
            assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)"), name
        browser.close()
    assert len(asked) > len(pages(site))
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
