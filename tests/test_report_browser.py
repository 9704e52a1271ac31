"""The report in a real browser: sorted, expanded, filtered, without an error or a request to anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness_tasks import write_tasks
from report_fixtures import write_run

from lm_eval_lora_ensemble import cli

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium here: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

REAL = Path(__file__).parent / "data" / "smollm2_arc_easy"


def lm_eval(output: Path, tasks: Path, *words: str) -> None:
    """Run lm-eval's own command on local tasks."""
    command = [sys.executable, "-m", "lm_eval_lora_ensemble", "run", *words, "--device", "cpu"]
    command += ["--tasks", "both,quickstart_countries", "--include_path", str(tasks), "--limit", "20"]
    command += ["--log_samples", "--output_path", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def page_file(llama, ensemble, tmp_path_factory) -> Path:
    """The report of an ensemble, of its base model alone, and of the five real members on ARC-Easy."""
    place = tmp_path_factory.mktemp("browser")
    tasks = write_tasks(place / "tasks")
    lm_eval(place / "runs", tasks, "--model", "lora-ensemble", "--model_args", f"adapters={ensemble}")
    lm_eval(place / "runs", tasks, "--model", "hf", "--model_args", f"pretrained={llama}")
    words = ["report", str(place / "runs"), str(REAL), "--ood", "mmlu_anatomy", "--resamples", "100"]
    assert cli.main([*words, "--figures", "4", "--output", str(place / "report")]) == 0
    return place / "report" / "report.html"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """Open a file; when the test is done, nothing was complained about and nothing was asked of a network."""
    complaints, requests, contexts = [], [], []

    def open_page(file: Path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in requests)
    assert sum(url.startswith("file:") for url in requests) == len(contexts)


def test_the_leaderboard_sorts_by_a_column_both_ways(opened, page_file):
    page = opened(page_file)
    head = page.locator("#board thead tr").nth(1).locator("th[data-metric=nll]").first
    column = page.locator("#board tbody tr").first.locator("td").count()
    assert column > 0
    for direction in ("descending", "ascending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == direction
        values = page.evaluate(
            """() => [...document.querySelectorAll("#board tbody tr")]
                .map(row => row.querySelector("td[data-metric=nll]").dataset.value).filter(v => v).map(Number)"""
        )
        assert len(values) > 3
        assert values == sorted(values, reverse=direction == "descending")


def test_a_group_opens_to_its_tasks_and_stays_with_its_run(opened, page_file):
    page = opened(page_file)
    assert page.locator("tr.subtask").count() == 0
    button = page.locator("button.expand").first
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    below = page.locator("tr.subtask")
    assert below.count() == 2
    assert below.first.locator("th").inner_text().startswith("plain_a (20)")
    assert below.first.locator("td .value").first.inner_text() != ""
    owner = page.locator("tr:has(> th > button[aria-expanded=true]) > th").inner_text()
    page.locator("#board th[data-metric=nll] button").first.click()
    assert below.first.locator("xpath=preceding-sibling::tr[1]/th").inner_text() == owner
    button = page.locator("button.expand[aria-expanded=true]")
    button.click()
    assert below.count() == 0


def test_columns_and_rows_can_be_hidden(opened, page_file):
    page = opened(page_file)
    ece = page.locator("td[data-metric=ece]").first
    assert ece.is_visible()
    page.locator("#columns label", has_text="ece").locator("input").uncheck()
    assert not ece.is_visible()
    page.locator("#kinds label", has_text="best member").locator("input").uncheck()
    assert not page.locator("tr[data-kind='best member']").first.is_visible()


def test_documents_are_filtered_by_task_answer_and_reason(opened, page_file):
    page = opened(page_file)
    assert page.locator("#cards > li").count() == 20
    page.select_option("#filter-task", "quickstart_countries")
    page.select_option("#filter-answer", "wrong")
    page.select_option("#filter-reason", label="confident and wrong")
    where = page.locator(".where").all_inner_texts()
    assert where
    assert all("quickstart_countries" in text and "· wrong ·" in text for text in where)
    tops = [
        max(float(bar) for bar in card.locator(".bar").all_inner_texts())
        for card in page.locator("#cards > li").all()
    ]
    assert tops == sorted(tops, reverse=True)
    assert page.locator(".question").first.inner_text().strip()


def test_pages_turn(opened, page_file):
    page = opened(page_file)
    first = page.locator(".where").first.inner_text()
    page.click("#next")
    assert page.locator("#page").inner_text().startswith("page 2 of")
    assert page.locator(".where").first.inner_text() != first
    page.click("#previous")
    assert page.locator(".where").first.inner_text() == first


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(opened, page_file, scheme):
    page = opened(page_file, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    ink, paper = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor] }"
    )
    brightness = {name: sum(map(int, c[4:-1].split(","))) for name, c in (("ink", ink), ("paper", paper))}
    assert (brightness["ink"] < brightness["paper"]) == (scheme == "light")


def test_it_prints(opened, page_file):
    assert len(opened(page_file).pdf()) > 50_000


def test_hostile_questions_show_as_text(opened, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    write_run(tmp_path / "in", {"one": 12}, text=lambda task, d: f"{evil} {d}")
    words = ["report", str(tmp_path / "in"), "--output", str(tmp_path / "r"), "--resamples", "20"]
    assert cli.main([*words, "--title", evil, "--figures", "1"]) == 0
    page = opened(tmp_path / "r" / "report.html")
    assert page.locator(".question").first.inner_text().startswith(evil)
    assert page.locator("h1").inner_text() == evil
    assert page.locator("main img[src=x]").count() == 0


@pytest.mark.long
def test_twenty_mmlu_runs_open_in_three_seconds(opened, tmp_path):
    """20 runs × 57 subjects, every one of MMLU's 14,042 documents in each."""
    sizes = {f"mmlu_subject_{i:02d}": 246 + (i < 20) for i in range(57)}
    groups = {"mmlu": list(sizes), **{name: [] for name in sizes}}
    for seed in range(20):
        write_run(tmp_path / "in" / f"run_{seed:02d}", sizes, seed=seed, groups=groups)
    words = ["report", str(tmp_path / "in"), "--output", str(tmp_path / "r"), "--resamples", "50"]
    assert cli.main(words) == 0
    file = tmp_path / "r" / "report.html"
    start = time.monotonic()
    page = opened(file)
    page.locator("#cards > li").first.wait_for()
    seconds = time.monotonic() - start
    print(f"opened in {seconds:.2f} s, {file.stat().st_size / 1e6:.1f} MB")
    assert seconds < 3
    assert file.stat().st_size < 15e6
