"""A results folder that release 0.1.0 wrote is read as that release read it, to nine digits, but for two mistakes.

1 − max p̄ was a difference from 1, which made the two surest documents of ``plain_a`` equal, and intervals of detection
drew the documents of a group one by one, where all others draw its tasks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm_eval_lora_ensemble import cli

OLD = Path(__file__).parent / "data" / "release_0_1_0"


@pytest.fixture(scope="module")
def now(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("analysis") / "now.json"
    options = ["--resamples", "200", "--ood", "varies_context", "--json", str(file)]
    assert cli.main(["analyse", str(OLD / "results"), *options]) == 0
    (run,) = json.loads(file.read_text())["runs"]
    return run


@pytest.fixture(scope="module")
def then() -> dict:
    return json.loads((OLD / "analysis.json").read_text())


def differences(then: object, now: object, place: str = "") -> list[str]:
    """Return where ``now`` lacks something of ``then``, or has another value."""
    if isinstance(then, dict):
        assert isinstance(now, dict), place
        return [d for key in then for d in differences(then[key], now.get(key, "lacks it"), f"{place}/{key}")]
    if isinstance(then, list):
        if not isinstance(now, list) or len(then) != len(now):
            return [f"{place}: {then} then, {now} now"]
        return [
            d
            for i, pair in enumerate(zip(then, now, strict=True))
            for d in differences(*pair, f"{place}/{i}")
        ]
    if isinstance(then, float) and isinstance(now, (int, float)):
        return [] if now == pytest.approx(then, abs=1e-9, rel=1e-9) else [f"{place}: {then} then, {now} now"]
    return [] if then == now else [f"{place}: {then!r} then, {now!r} now"]


def test_every_number_is_what_it_was(then, now):
    metrics = now["tasks"]
    for task in metrics.values():
        for metric in task["metrics"].values():
            for key in ("member_mean", "difference"):
                metric[key] = metric[key]["value"]
    assert set(then["tasks"]) <= set(metrics)
    found = differences(then["tasks"], {name: task["metrics"] for name, task in metrics.items()})
    mended = ("/plain_a/", "/both/")  # which pools it
    assert [d for d in found if not (d.startswith(mended) and "max_probability/" in d)] == []
    of_group = differences(then["detection"], now["detection"])
    assert [d for d in of_group if "/value:" in d or not d.startswith("/both/")] == []
    # the reasons behind the colon are others now
    said = [{name: why.partition(":")[0] for name, why in found["skipped"].items()} for found in (then, now)]
    assert said[0] == said[1]


def test_the_comparison_sees_a_difference(then):
    changed = json.loads(json.dumps(then["tasks"]))
    changed["both"]["nll"]["ensemble"]["value"] += 1e-7
    assert len(differences(then["tasks"], changed)) == 1
