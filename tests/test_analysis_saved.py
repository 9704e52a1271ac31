"""Every number of the battery against ``independent_battery``: on random documents and on runs lm_eval saved.

``data/smollm2_arc_easy`` holds what lm_eval wrote for five members of SmolLM2-135M trained on ARC-Easy,
texts stripped: ARC-Easy's validation split and sixty documents each of three MMLU subjects.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import independent_battery as independent
import numpy as np
import pytest

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.analysis.comparison import compare
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.run import merge_runs
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import METRICS

REAL = Path(__file__).parent / "data" / "smollm2_arc_easy"
TASKS = ("arc_easy_validation", "mmlu_anatomy", "mmlu_astronomy", "mmlu_college_physics")


def real(task: str) -> list[independent.Document]:
    (path,) = REAL.glob(f"samples_{task}_*.jsonl")
    return independent.from_samples(path)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What the command writes for the real run."""
    file = tmp_path_factory.mktemp("uncertainty") / "all.json"
    options = ["--ood", "mmlu_anatomy", "--calibrate", "arc_easy_validation", "--resamples", "50"]
    assert cli.main(["analyse", str(REAL), *options, "--json", str(file)]) == 0
    (run,) = json.loads(file.read_text())["runs"]
    return run


def assert_same(ours: dict[str, float | None], theirs: dict[str, float]) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        got = ours[name] if ours[name] is not None else np.nan  # JSON has no NaN
        assert got == pytest.approx(value, abs=1e-6, nan_ok=True), name


def random_documents(seed: int, members: int) -> list[independent.Document]:
    rng = np.random.default_rng(seed)
    widths = rng.integers(2, 6, 150)
    base = [rng.normal(size=w) * 3 for w in widths]
    return [
        independent.Document(b + rng.normal(size=(members, len(b))), int(rng.integers(len(b)))) for b in base
    ]


@pytest.mark.parametrize(("seed", "members"), [(0, 1), (1, 2), (2, 5), (3, 9)])
def test_every_metric_on_random_documents(seed, members):
    documents = random_documents(seed, members)
    scores = np.full((members, len(documents), 5), -np.inf)
    for d, document in enumerate(documents):
        scores[:, d, : document.choices] = document.scores
    predictions = Predictions.from_scores(
        scores, [d.gold for d in documents], counts=[d.choices for d in documents]
    )
    ours = {name: float(v[0]) for name, v in Battery(predictions)(np.ones((1, len(documents)))).items()}
    assert_same(ours, independent.battery(documents))


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_on_real_samples(found, task):
    metrics = found["tasks"][task]["metrics"]
    assert list(metrics) == list(METRICS)
    documents = real(task)
    assert_same({name: m["ensemble"]["value"] for name, m in metrics.items()}, independent.battery(documents))
    for member in range(5):
        alone = independent.battery([d.only(member) for d in documents])
        assert_same({name: m["members"][member] for name, m in metrics.items()}, alone)


def test_detection_on_real_samples(found):
    outside = real("mmlu_anatomy")
    for task in set(TASKS) - {"mmlu_anatomy"}:
        theirs = independent.detection(real(task), outside)
        ours = found["detection"][task]["mmlu_anatomy"]
        for score, values in theirs.items():
            assert_same({kind: ours[score][kind]["value"] for kind in values}, values)


def test_recalibration_on_real_samples(found):
    t = independent.temperature(real("arc_easy_validation"))
    ours = found["recalibration"]["mmlu_astronomy"][0]
    assert ours["temperatures"] == pytest.approx([t], rel=1e-4)
    theirs = independent.battery(independent.scaled(real("mmlu_astronomy"), ours["temperatures"][0]))
    assert_same(
        {name: estimate["value"] for name, estimate in ours["metrics"].items()},
        {name: theirs[name] for name in ours["metrics"]},
    )


@pytest.mark.parametrize("method", ["thr", "aps", "raps"])
def test_conformal_sets_on_real_samples(found, method):
    """The threshold is the least one that covers the calibration half as often as promised."""
    ours = next(c for c in found["tasks"]["arc_easy_validation"]["conformal"] if c["method"] == method)
    documents, rng = real("arc_easy_validation"), np.random.default_rng(0)
    order, half = np.random.default_rng(0).permutation(len(documents)), len(documents) // 2
    calibration, test = ([documents[i] for i in sorted(part)] for part in (order[:half], order[half:]))
    calibrated, fits = ([nonconformity(d.mixture, method, rng) for d in part] for part in (calibration, test))
    level = np.ceil((half + 1) * 0.9) / half
    golds = [score[d.gold] for score, d in zip(calibrated, calibration, strict=True)]
    threshold = np.quantile(golds, level, method="inverted_cdf")
    sets = [score <= threshold for score in fits]
    assert ours["threshold"] == pytest.approx(threshold)
    covered = np.mean([s[d.gold] for s, d in zip(sets, test, strict=True)])
    assert ours["coverage"]["value"] == pytest.approx(covered)
    assert ours["mean_size"]["value"] == pytest.approx(np.mean([s.sum() for s in sets]))


def nonconformity(p: np.ndarray, method: str, rng: np.random.Generator) -> np.ndarray:
    if method == "thr":
        return 1 - p
    u = rng.uniform()
    rank = np.array([(p > x).sum() + 1 for x in p])
    aps = np.array([p[p > x].sum() + u * x for x in p])
    return aps + (0.01 * np.maximum(0, rank - 2) if method == "raps" else 0)


def test_ensemble_sizes_on_real_samples(found):
    documents = real("mmlu_anatomy")
    singles = [independent.battery([d.only(m) for d in documents]) for m in range(5)]
    rows = found["tasks"]["mmlu_anatomy"]["by_size"]
    assert_same(rows[0]["mean"], {name: np.mean([s[name] for s in singles]) for name in METRICS})
    assert_same(rows[-1]["mean"], independent.battery(documents))


def test_two_runs_of_real_samples_agree_and_differ_as_defined():
    """Members 0–2 against members 3–4 of the same real documents."""
    (run,) = merge_runs(load_runs(REAL))
    first, second = (
        replace(run, tasks={t: p.only(list(chosen)) for t, p in run.tasks.items()}, groups={})
        for chosen in ((0, 1, 2), (3, 4))
    )
    compared = compare(first, second, Settings(resamples=20))["mmlu_astronomy"]
    documents = real("mmlu_astronomy")
    a, b = (
        [independent.Document(d.scores[list(chosen)], d.gold) for d in documents]
        for chosen in ((0, 1, 2), (3, 4))
    )
    theirs_a, theirs_b = independent.battery(a), independent.battery(b)
    assert_same(
        {name: e.value for name, e in compared.difference.items()},
        {name: theirs_a[name] - theirs_b[name] for name in theirs_a},
    )
    pairs = list(zip(a, b, strict=True))
    assert compared.agreement.value == pytest.approx(
        np.mean([x.mixture.argmax() == y.mixture.argmax() for x, y in pairs])
    )
    assert compared.total_variation.value == pytest.approx(
        np.mean([np.abs(x.mixture - y.mixture).sum() / 2 for x, y in pairs])
    )
