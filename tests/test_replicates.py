"""Replicates against scipy's t intervals, an enumeration of the two-way bootstrap, and files on disk."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from report_fixtures import write_run
from scipy import stats

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.analysis.replicates import (
    evaluate_replicates,
    replicate_sets,
    spread,
    student_interval,
    two_way,
    welch_interval,
)
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.bootstrap import ResamplingPlan, bootstrap
from lm_eval_lora_ensemble.report.build import make_report
from lm_eval_lora_ensemble.report.model import Options

QUICK = Settings(resamples=200)


def trained(seed: int, *, first: int | None = None, **recipe: object) -> dict:
    """The configuration of an ensemble of five members with their seeds from ``first`` on."""
    seeds = range(seed if first is None else first, (seed if first is None else first) + 5)
    return {
        "model": "lora-ensemble",
        "model_args": {"adapters": f"ensemble_{seed}"},
        "lora_ensemble": {
            "fingerprint": f"{seed:064d}",
            "base_model": "base",
            "epoch": None,
            "average": "probability",
            "members": [{"name": f"m{s}", "seed": s, "sha256": f"{s:064x}"} for s in seeds],
            "recipe": {"seed": seed, "rank": 8, **recipe},
        },
    }


@pytest.fixture
def place(tmp_path) -> Path:
    for seed in (0, 10, 20):
        write_run(tmp_path / f"run_{seed}", {"one": 60, "two": 40}, seed=seed, config=trained(seed))
    return tmp_path


def test_intervals_over_replicates_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=4), rng.normal(size=3) * 3 + 1
    assert student_interval(a, 0.9) == pytest.approx(
        stats.t.interval(0.9, 3, loc=a.mean(), scale=stats.sem(a))
    )
    theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert welch_interval(a, b, 0.95) == pytest.approx((theirs.low, theirs.high))
    assert np.isnan(student_interval(a[:1], 0.95)).all()
    assert np.isnan(welch_interval(a[:1], b, 0.95)).all()
    assert welch_interval(np.ones(2), np.zeros(2), 0.95) == (1.0, 1.0)


def test_the_two_way_bootstraps_moments_are_those_of_all_its_outcomes():
    table = np.random.default_rng(1).normal(size=(3, 3))  # replicates by documents
    outcomes = [
        table[np.ix_(k, d)].mean()
        for k in itertools.product(range(3), repeat=3)
        for d in itertools.product(range(3), repeat=3)
    ]
    plan = ResamplingPlan(3, 60_000, 0)
    each = [
        bootstrap(lambda w, row=row: {"x": w @ row / w.sum(axis=1)}, plan).resampled["x"] for row in table
    ]
    drawn = two_way(np.stack(each), seed=1)
    error = np.std(outcomes) / np.sqrt(len(drawn))
    assert abs(drawn.mean() - np.mean(outcomes)) < 4 * error
    assert drawn.var() == pytest.approx(np.var(outcomes), rel=0.03)
    # documents alone would vary less: the replicates' part is there
    assert np.mean(each, axis=0).var() < 0.9 * np.var(outcomes)


def test_members_of_replicates_of_different_sizes_count_alike():
    few, many = [1.0, 2.0], [0.0, 0.0, 0.0, 3.0]
    columns = 60_000
    drawn = two_way([np.repeat(np.array(of)[:, None], columns, axis=1) for of in (few, many)], seed=4)
    outcomes = [
        sum(sum(draw) for draw in pair) / sum(map(len, pair))
        for sides in itertools.product((few, many), repeat=2)
        for pair in itertools.product(*[list(itertools.product(side, repeat=len(side))) for side in sides])
    ]
    weights = [
        0.25 / math.prod(len(side) ** len(side) for side in sides)
        for sides in itertools.product((few, many), repeat=2)
        for _ in range(math.prod(len(side) ** len(side) for side in sides))
    ]
    mean = np.average(outcomes, weights=weights)
    variance = np.average((np.array(outcomes) - mean) ** 2, weights=weights)
    assert drawn.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / columns))
    assert drawn.var() == pytest.approx(variance, rel=0.03)


def test_members_of_replicates_are_drawn_within_them():
    table = np.random.default_rng(2).normal(size=(2, 2))  # replicates by members, the same for every document
    outcomes = [
        np.mean([[table[k, m] for m in of] for k, of in zip(ks, (ms[:2], ms[2:]), strict=True)])
        for ks in itertools.product(range(2), repeat=2)
        for ms in itertools.product(range(2), repeat=4)
    ]
    drawn = two_way(np.broadcast_to(table[..., None], (2, 2, 60_000)), seed=3)
    assert drawn.mean() == pytest.approx(np.mean(outcomes), abs=4 * np.std(outcomes) / np.sqrt(60_000))
    assert drawn.var() == pytest.approx(np.var(outcomes), rel=0.03)


def test_a_metric_that_is_undefined_somewhere_has_no_interval():
    found = spread([1.0, np.nan], np.ones((2, 10)), 0.95)
    assert np.isnan([found.mean, found.standard_deviation, *found.t, *found.two_way]).all()


def test_a_biased_metrics_interval_is_mirrored_at_its_mean():
    values, noise = [0.03, 0.05, 0.04], np.random.default_rng(5).normal(0, 0.01, (3, 4000))
    for bias, mirrored in ((0.002, False), (0.04, True)):
        found = spread(values, np.array(values)[:, None] + bias + noise, 0.95)
        low, high = np.quantile(two_way(np.array(values)[:, None] + bias + noise), [0.025, 0.975])
        expected = (0.08 - high, 0.08 - low) if mirrored else (low, high)
        assert found.two_way == pytest.approx(expected, abs=1e-12)


def test_values_are_those_of_the_runs_and_of_all_their_members(place):
    runs = load_runs(place)
    found = evaluate_replicates(runs, QUICK)["one"]
    assert (found.replicates, found.members, found.documents) == (3, 15, 60)

    def nll(p: np.ndarray, gold: np.ndarray) -> float:
        return -np.log(p[np.arange(60), gold]).mean()

    each = [run.predictions("one") for run in runs]
    gold = each[0].is_gold.argmax(axis=1)
    whole = [nll(p.probabilities.mean(axis=0), gold) for p in each]
    alone = [[nll(member, gold) for member in p.probabilities] for p in each]
    assert found.ensemble["nll"].values == pytest.approx(whole)
    assert found.ensemble["nll"].standard_deviation == pytest.approx(np.std(whole, ddof=1))
    assert found.ensemble["nll"].t == pytest.approx(
        stats.t.interval(0.95, 2, loc=np.mean(whole), scale=stats.sem(whole))
    )
    assert found.member["nll"].values == pytest.approx(np.ravel(alone))
    assert found.difference["nll"].values == pytest.approx(np.array(whole) - np.mean(alone, axis=1))
    low, high = found.ensemble["nll"].two_way
    assert low < found.ensemble["nll"].mean < high


def test_provenance_tells_replicates_from_others(place, tmp_path):
    write_run(tmp_path / "other", {"one": 60}, seed=30, config=trained(30, rank=16))
    write_run(tmp_path / "shares", {"one": 60}, seed=31, config=trained(31, first=22))
    unknown = trained(40)
    del unknown["lora_ensemble"]["recipe"]
    write_run(tmp_path / "unknown", {"one": 60}, seed=32, config=unknown)
    runs = load_runs(tmp_path)
    (found,) = replicate_sets(runs)
    assert len(found) == 3
    assert "other" not in {Path(runs[i].source).name for i in found}
    assert "unknown" not in {Path(runs[i].source).name for i in found}
    named = [[tmp_path / "other", tmp_path / "unknown"]]
    first, rest = replicate_sets(runs, named)
    assert {Path(runs[i].source).name for i in first} == {"other", "unknown"}
    assert rest == found


def test_runs_that_share_members_are_named_and_no_replicates(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"run_{seed}", {"one": 60}, seed=seed, config=trained(seed))
    assert replicate_sets(load_runs(tmp_path)) == []
    assert cli.main(["analyse", str(tmp_path), "--resamples", "20"]) == 0
    assert "share 4 members" in capsys.readouterr().out
    report = make_report(load_runs(tmp_path), Options(settings=QUICK))
    assert any("share 4 members" in note for note in report.notes)
    assert not any(row.kind == "replicates" for row in report.boards[0].rows)


def test_named_replicates_that_are_none_are_refused(place, tmp_path):
    write_run(tmp_path / "shares", {"one": 60}, seed=31, config=trained(31, first=22))
    runs = load_runs(tmp_path)
    for names, words in (
        (["run_20", "shares"], "share members"),
        (["run_0"], "two runs or more"),
        (["run_0", "run_0"], "two runs or more"),
        ([".", "run_0"], "holds 4 runs"),
        (["none", "run_0"], "holds no run"),
    ):
        with pytest.raises(EnsembleError, match=words):
            replicate_sets(runs, [[tmp_path / name for name in names]])


def test_other_documents_are_refused(place, tmp_path):
    write_run(tmp_path / "short", {"one": 50}, seed=30, config=trained(30))
    with pytest.raises(EnsembleError, match="same documents"):
        evaluate_replicates(load_runs(tmp_path), QUICK)


def noisy(folder: Path, seed: int, rank: int, spread: float) -> None:
    """Write an ensemble whose scores are ``spread`` times as far from the truth."""
    write_run(folder, {"one": 150}, seed=seed, config=trained(seed, rank=rank), sharpness=2.0)
    (file,) = folder.glob("samples_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rng = np.random.default_rng(seed)
    for line in lines:
        members = np.array(line["members"])
        line["members"] = (members + spread * rng.normal(size=members.shape)).tolist()
        line["filtered_resps"] = [[str(v), "False"] for v in np.mean(line["members"], axis=0)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_best_goes_by_the_t_interval_of_replicates(tmp_path):
    for seed in (0, 10, 20):
        noisy(tmp_path / f"good_{seed}", seed, 8, 0.0)
        noisy(tmp_path / f"bad_{seed}", 100 + seed, 16, 4.0)
    report = make_report(load_runs(tmp_path), Options(settings=QUICK))
    (board,) = report.boards
    rows = {(row.entry, row.kind): row for row in board.rows}
    means = [row for row in board.rows if row.kind == "replicates"]
    assert len(means) == 2
    for row, start in zip(means, ("bad", "good"), strict=True):
        of = [i for i, e in enumerate(report.entries) if Path(e.run.source).name.startswith(start)]
        values = [rows[i, "ensemble"].cells["nll"].value for i in of]
        cell = row.cells["nll"]
        assert cell.value == pytest.approx(np.mean(values))
        assert (cell.low, cell.high) == pytest.approx(
            stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
        )
        assert (cell.interval, cell.replicates) == ("t", 3)
    marked = {(row.kind, row.entry) for row in board.rows if row.cells["nll"].best}
    assert marked == {("replicates", means[1].entry)}
    # two seeds of which one is as good as the others: their mean is not measurably better than anything
    report = make_report(
        [r for r in load_runs(tmp_path) if Path(r.source).name in ("good_0", "bad_0", "good_10", "bad_10")],
        Options(
            settings=QUICK,
            replicates=(
                (tmp_path / "good_0", tmp_path / "bad_0"),
                (tmp_path / "good_10", tmp_path / "bad_10"),
            ),
        ),
    )
    assert not [r for r in report.boards[0].rows if r.kind.startswith("repl") and r.cells["nll"].best]


def test_the_report_shows_replicates(place, tmp_path):
    words = ["report", str(place), "--output", str(tmp_path / "r"), "--resamples", "20", "--figures", "0"]
    assert cli.main(words) == 0
    for name in ("report.html", "report.md", "leaderboard.csv"):
        assert "mean of 3 replicates" in (tmp_path / "r" / name).read_text(), name
    assert "interval over 3 replicates" in (tmp_path / "r" / "report.html").read_text()


def test_the_command_prints_a_table_and_writes_json(place, tmp_path, capsys):
    names = [str(place / f"run_{seed}") for seed in (0, 10, 20)]
    words = ["analyse", "--replicates", *names, "--json", str(tmp_path / "out.json"), "--resamples", "20"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "3 replicates:" in printed
    assert "3 replicates of 15 members together, 60 documents" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["runs"]) == 3
    (found,) = written["replicates"]
    assert found["tasks"]["two"]["ensemble"]["nll"]["mean"] > 0
    # named, and read once though they are among the results too
    assert cli.main(["analyse", str(place), "--replicates", *names, "--resamples", "20"]) == 0
    assert capsys.readouterr().out.count("3 replicates:") == 1
    assert cli.main(["analyse"]) == 2
