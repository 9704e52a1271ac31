"""The report against the files it was made from: numbers, marks, sentences, and what hostile files do to it."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import independent_battery as independent
import numpy as np
import pytest
from report_fixtures import write_run

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.run import merge_runs
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.report.build import make_report
from lm_eval_lora_ensemble.report.entries import make_entries
from lm_eval_lora_ensemble.report.leaderboard import COLUMNS, resamples_for
from lm_eval_lora_ensemble.report.markdown import escape
from lm_eval_lora_ensemble.report.model import Options
from lm_eval_lora_ensemble.report.series import compare_series, make_series

REAL = Path(__file__).parent / "data" / "smollm2_arc_easy"
FEW = ["--resamples", "50"]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The report of a real run of five members: ARC-Easy in-domain, anatomy out-of-domain."""
    folder = tmp_path_factory.mktemp("real") / "report"
    words = ["report", str(REAL), "--ood", "mmlu_anatomy", "--output", str(folder), "--figures", "3"]
    assert cli.main([*words, "--resamples", "200"]) == 0
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_cells_are_the_independent_battery_and_name_their_file(real):
    board = next(b for b in read(real)["leaderboard"] if b["task"] == "arc_easy_validation")
    rows = {row["kind"]: row["cells"] for row in board["rows"]}
    (file,) = REAL.glob("samples_arc_easy*")
    documents = independent.from_samples(file)
    whole = independent.battery(documents)
    alone = [independent.battery([d.only(m) for d in documents]) for m in range(5)]
    best = min(alone, key=lambda b: b["nll"])
    for metric in COLUMNS:
        cell = rows["ensemble"][metric]
        assert cell["value"] == pytest.approx(whole[metric], abs=1e-6), metric
        assert (cell["n"], cell["resamples"], cell["source"]) == (570, 200, [str(file)])
        assert cell["low"] <= cell["high"]
        if metric != "error_auroc_mutual_information":
            mean = np.mean([member[metric] for member in alone])
            assert rows["mean member"][metric]["value"] == pytest.approx(mean, abs=1e-6)
            assert rows["best member"][metric]["value"] == pytest.approx(best[metric], abs=1e-6)


def test_a_mark_needs_a_paired_interval_and_no_hindsight(real):
    boards = read(real)["leaderboard"]
    marked = {
        (b["task"], r["kind"], m)
        for b in boards
        for r in b["rows"]
        for m, cell in r["cells"].items()
        if cell["best"]
    }
    assert ("arc_easy_validation", "ensemble", "nll") in marked
    assert not any(metric in ("predictive_entropy", "mutual_information") for _, _, metric in marked)
    assert not any(kind == "best member" for _, kind, _ in marked)
    # 570 documents do not decide which of .637 and .628 is the better accuracy
    assert ("arc_easy_validation", "ensemble", "accuracy") not in marked


def test_sentences_follow_from_the_cells(real):
    said = read(real)["statements"]
    about = next(s for s in said if "on arc_easy_validation" in s)
    assert "nll 1.609 (0.101 below its mean member's" in about
    assert "does not differ measurably from its mean member's" in about
    assert any(
        re.search(r"tells mmlu_anatomy from arc_easy_validation by entropy with AUROC 0\.97", s) for s in said
    )


def test_every_file_is_there_and_the_page_needs_no_network(real):
    names = {path.relative_to(real).as_posix() for path in real.rglob("*") if path.is_file()}
    assert {"report.html", "report.md", "report.json", "leaderboard.csv"} <= names
    figures = [name for name in names if name.startswith("figures/")]
    assert len(figures) == 6
    assert {Path(name).suffix for name in figures} == {".svg", ".png"}
    page = (real / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "3 of" in page and "--figures" in page  # what is not drawn is said


def test_the_pages_script_reads_every_field_by_the_name_it_was_written_under(runs, tmp_path):
    words = ["report", str(runs), "--output", str(tmp_path / "r"), *FEW, "--figures", "0"]
    assert cli.main(words) == 0
    page = (tmp_path / "r" / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    script = page.rsplit("<script>", 1)[1]
    assert data["documents"] and data["subtasks"]
    assert {frozenset(document) for document in data["documents"]} == {
        frozenset(re.findall(r"\bd\.(\w+)", script))
    }
    rows = [row for subtask in data["subtasks"] for row in subtask["rows"]]
    assert {frozenset(row) for row in rows} == {frozenset(re.findall(r"\bvalues\.(\w+)", script))}
    assert all(set(row["cells"]) == set(COLUMNS) for row in rows)
    read = set(re.search(r"const \{ (.*?) \} = values.cells", script)[1].split(", "))
    assert read == {"display", "interval", "best"}
    # a cell without an interval or a mark leaves them out
    assert all({"display"} <= set(cell) <= read for row in rows for cell in row["cells"].values())


def test_csv_and_markdown_hold_the_same_numbers(real):
    rows = list(csv.DictReader((real / "leaderboard.csv").open()))
    cell = next(b for b in read(real)["leaderboard"] if b["task"] == "mmlu_anatomy")["rows"][0]["cells"][
        "nll"
    ]
    assert float(rows[0]["mmlu_anatomy/nll"]) == cell["value"]
    assert float(rows[0]["mmlu_anatomy/nll/low"]) == cell["low"]
    assert cell["display"] in (real / "report.md").read_text()


GROUPS = {"all": ["one", "two"], "one": [], "two": []}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two ensembles and a single model on two tasks of a group."""
    place = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        write_run(place / name, {"one": 40, "two": 60}, seed=seed, groups=GROUPS)
    hf = {"model": "hf", "model_args": "pretrained=some/baseline-7b"}  # a string, as lm-eval keeps Python's
    write_run(place / "hf", {"one": 40, "two": 60}, seed=5, members=1, groups=GROUPS, config=hf)
    return place


def report_of(place, **options):
    return make_report(merge_runs(load_runs(place)), Options(settings=Settings(resamples=50), **options))


def test_groups_pool_documents_and_macro_stands_beside(runs):
    report = report_of(runs)
    boards = {board.task: board for board in report.boards}
    assert [board.task for board in report.boards if board.top] == ["all"]
    assert boards["all"].documents == (100, 100)
    kinds = [row.kind for row in boards["all"].rows]
    ensemble = ["ensemble", "macro", "mean member", "best member"]
    assert kinds == [*ensemble, "model", "macro", *ensemble]
    micro, macro = boards["all"].rows[:2]
    each = [boards[task].rows[0].cells["nll"].value for task in ("one", "two")]
    assert macro.cells["nll"].value == pytest.approx(np.mean(each))
    assert micro.cells["nll"].value == pytest.approx(np.average(each, weights=[40, 60]))
    assert len(micro.cells["nll"].source) == 2


def test_runs_are_named_by_what_tells_them_apart(runs, tmp_path):
    labels = [entry.label for entry in make_entries(load_runs(runs))]
    assert sorted(labels) == ["baseline-7b", "first ×5", "second ×5"]
    write_run(tmp_path / "a" / "same", {"one": 10}, seed=1)
    write_run(tmp_path / "b" / "same", {"one": 10}, seed=2)
    labels = [entry.label for entry in make_entries(load_runs(tmp_path))]
    assert len(set(labels)) == 2


def test_other_documents_are_shown_but_not_compared(tmp_path):
    write_run(tmp_path / "a", {"one": 40}, seed=0)
    write_run(tmp_path / "b", {"one": 30}, seed=1)
    report = report_of(tmp_path)
    assert report.boards[0].documents == (30, 40)
    assert not any(cell.best for row in report.boards[0].rows for cell in row.cells.values())
    assert any("different documents" in note for note in report.notes)


def test_missing_samples_are_named_and_the_rest_is_shown(runs, tmp_path, capsys):
    shutil.copytree(runs / "first", tmp_path / "first")
    next((tmp_path / "first").glob("samples_two_*")).unlink()
    report = report_of(tmp_path)
    assert [board.task for board in report.boards] == ["one"]
    assert any("all is left out: 1 of its 2 tasks" in note for note in report.notes)
    next((tmp_path / "first").glob("samples_one_*")).unlink()
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "r")]) == 2
    assert "--log_samples" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_an_unknown_ood_task_and_a_foreign_output_folder_are_refused(runs, tmp_path, capsys):
    assert cli.main(["report", str(runs), "--ood", "three", "--output", str(tmp_path / "r"), *FEW]) == 2
    assert "tasks are all, one, two" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert cli.main(["report", str(runs), "--output", str(tmp_path / "mine"), *FEW, "--figures", "0"]) == 2
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_report_is_replaced_in_one_step(runs, tmp_path):
    words = ["report", str(runs), "--output", str(tmp_path / "r"), *FEW, "--figures", "0"]
    assert cli.main(words) == 0
    (tmp_path / "r" / "stale").touch()
    assert cli.main([*words, "--title", "again"]) == 0
    assert not (tmp_path / "r" / "stale").exists()
    assert "<title>again</title>" in (tmp_path / "r" / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_link_to_a_report_stays_a_link(runs, tmp_path):
    words = ["report", str(runs), *FEW, "--figures", "0", "--output"]
    assert cli.main([*words, str(tmp_path / "r")]) == 0
    (tmp_path / "link").symlink_to("r")
    assert cli.main([*words, str(tmp_path / "link"), "--title", "again"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert "<title>again</title>" in (tmp_path / "r" / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "r"]


def test_a_missing_library_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)  # what an environment without it looks like to find_spec
    assert cli.main(["report", str(REAL), "--output", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err
    assert "jinja2 is missing; from a checkout, pip install '.[report]'" in said


@pytest.mark.parametrize(
    "kills", [pytest.param(12, id="12-kills"), pytest.param(200, id="200-kills", marks=pytest.mark.long)]
)
def test_at_every_instant_there_is_one_whole_report_whoever_is_killed(tmp_path, kills):
    write_run(tmp_path / "runs", {"one": 30}, members=2)
    harness = Path(__file__).with_name("report_kill_harness.py")
    words = [sys.executable, str(harness), str(tmp_path), str(kills), "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print({**found, "amiss": len(found["amiss"]), "deaths": len(found["deaths"])})
    assert found["amiss"] == []
    assert found["deaths"] == [signal.SIGKILL] * kills
    assert found["looks"] > 50 * kills  # without which nothing would have been seen
    assert found["titles"] > kills / 2
    assert found["last"] == "last"
    assert found["left"] == ["report", "runs"]


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>|*_`[a](javascript:0)\x1b[31m\u202e"


def test_hostile_texts_stay_texts(tmp_path, capsys):
    config = {"model": "hf", "model_args": {"pretrained": f"=HYPERLINK(1){EVIL}"}}
    write_run(tmp_path / "in", {"one": 12}, members=1, config=config, text=lambda task, d: f"{EVIL} {d}")
    words = ["report", str(tmp_path / "in"), "--output", str(tmp_path / "r"), "--title", EVIL, *FEW]
    assert cli.main([*words, "--figures", "0"]) == 0
    page = (tmp_path / "r" / "report.html").read_text()
    assert page.count("<script") == 2  # the data and the page's own
    assert "<img src=x" not in page
    assert "onerror" not in re.sub(r"&lt;.*?&gt;|\\u003c.*?\\u003e", "", page)
    markdown = (tmp_path / "r" / "report.md").read_text()
    assert "<script" not in markdown and "\x1b" not in markdown.split("##", 1)[1]
    first = next(csv.DictReader((tmp_path / "r" / "leaderboard.csv").open()))["row"]
    assert not first.startswith("=")
    assert "\x1b" not in capsys.readouterr().out


def test_markdown_escapes_what_would_be_markup():
    assert escape("a|b*c<d>") == r"a\|b\*c&lt;d&gt;"
    assert escape("[a](javascript:0) _b_") == r"[a\](javascript:0) \_b\_"
    assert escape("arc_easy [0.1, 0.2].") == "arc_easy [0.1, 0.2]."


def swept(adapters: str, epoch: int) -> dict:
    return {
        "model": "lora-ensemble",
        "model_args": {"adapters": adapters, "epoch": epoch},
        "lora_ensemble": {"fingerprint": f"{adapters}{epoch}", "base_model": "base", "epoch": epoch},
    }


def test_epochs_become_a_series_with_retention(tmp_path):
    for epoch, members in ((0, 1), (1, 3), (2, 3)):
        config = swept("runs/lambda_1", epoch)
        write_run(tmp_path / f"epoch_{epoch:02d}", {"one": 50}, seed=epoch, members=members, config=config)
    runs = load_runs(tmp_path)
    entries = make_entries(runs)
    assert [e.label for e in entries] == ["lambda_1 prior", "lambda_1 epoch 1 ×3", "lambda_1 epoch 2 ×3"]
    (series,) = make_series(entries, Settings(resamples=50))
    assert [p.epoch for p in series.points] == [0, 1, 2]
    assert [p.members for p in series.points] == [1, 3, 3]
    prior, later = (run.tasks["one"] for run in runs[:2])
    knew, knows = prior.correct, later.correct
    found = series.points[1].retention
    assert found["kept"].value == pytest.approx((knew & knows).sum() / knew.sum())
    assert found["lost"].value == pytest.approx(1 - found["kept"].value)
    assert found["gained"].value == pytest.approx((~knew & knows).sum() / (~knew).sum())
    kl = np.sum(later.mixture * np.log(later.mixture / prior.mixture), axis=1).mean()
    assert found["kl_to_prior"].value == pytest.approx(kl)
    singles = [(knew & later.only([m]).correct).sum() / knew.sum() for m in range(3)]
    assert series.points[1].retention_single["kept"].value == pytest.approx(np.mean(singles))
    assert series.points[0].retention["kept"].value == 1


def test_an_epoch_that_answered_other_documents_is_in_no_curve(tmp_path):
    for epoch, documents in ((0, 50), (1, 50), (2, 40), (3, 50)):
        write_run(tmp_path / f"{epoch}", {"one": documents}, seed=epoch, config=swept("runs/a", epoch))
    report = report_of(tmp_path)
    (series,) = report.series
    assert [point.epoch for point in series.points] == [0, 1, 3]
    assert [bool(point.retention) for point in series.points] == [True] * 3
    assert "a on one: epoch 2 answered other documents and is in no curve" in report.notes


def test_swept_ensembles_are_compared_where_they_answered_the_same_and_groups_by_task(tmp_path):
    for adapters, seed in (("runs/a", 0), ("runs/b", 10)):
        for epoch in (0, 1, 2):
            sizes = {"one": 50, "two": 30 + (epoch == 2) * seed}
            place = tmp_path / adapters / str(epoch)
            write_run(
                place, sizes, groups={"all": ["one", "two"]}, seed=seed + epoch, config=swept(adapters, epoch)
            )
    entries = make_entries(load_runs(tmp_path))
    (found,) = compare_series(entries, Settings(resamples=50))
    assert (found.first, found.second, found.task, found.epochs) == ("a", "b", "all", (0, 1))
    a, b = (
        next(e for e in entries if e.run.series == s and e.run.epoch == 1).run for s in ("runs/a", "runs/b")
    )
    same = [a.tasks[t].mixture.argmax(axis=1) == b.tasks[t].mixture.argmax(axis=1) for t in ("one", "two")]
    assert found.agreement[1].value == pytest.approx(np.concatenate(same).mean())
    # two tasks drawn as wholes: a resample is one of them twice or both
    means = [part.mean() for part in same]
    assert found.agreement[1].percentile == pytest.approx((min(means), max(means)))


def test_large_tasks_get_fewer_resamples():
    assert resamples_for(500, 1000) == 1000
    assert resamples_for(100_000, 1000) == 200
    assert resamples_for(100_000, 50) == 50


@pytest.mark.long
def test_a_hundred_thousand_documents_take_a_minute_and_a_gigabyte(tmp_path):
    write_run(tmp_path / "in", {"one": 100_000})
    # VmHWM is this program's own peak; getrusage's would be that of the process it was forked from. Its own
    # seconds, not the clock's: other tests share the cores
    code = (
        "import pathlib, re, sys, time; from lm_eval_lora_ensemble import cli; status = cli.main(sys.argv[1:]);"
        "print(time.process_time());"
        "print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]); sys.exit(status)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(tmp_path / "in"), "--output", str(tmp_path / "r")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, kilobytes = map(float, done.stdout.split()[-2:])
    clock = time.monotonic() - start
    print(f"{seconds:.0f} s of one core, {clock:.0f} s by the clock, {kilobytes / 1e6:.2f} GB")
    assert seconds <= 60
    assert kilobytes <= 1e6


def test_an_impossible_right_answer_is_no_difference_below_nothing(tmp_path):
    folder = write_run(tmp_path / "r", {"one": 20}, members=2)
    (file,) = folder.glob("samples_*")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    gold = int(lines[0]["target"])
    for member in lines[0]["members"]:
        member[gold] = -math.inf
    lines[0]["filtered_resps"][gold][0] = "-inf"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = report_of(folder)
    (said,) = [sentence for sentence in report.statements if "on one" in sentence]
    assert "nll ∞ (no interval of the difference from its mean member's)" in said


def test_no_torch_is_needed(runs, tmp_path):
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "lm_eval", "datasets"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Refuse())
from lm_eval_lora_ensemble import cli
sys.exit(cli.main(sys.argv[1:]))
"""
    words = ["report", str(runs), "--output", str(tmp_path / "r"), *FEW, "--figures", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert math.isclose(len(list((tmp_path / "r" / "figures").iterdir())), 2)
