"""The registry: what it refuses, what it loads, and that docs and the independent battery keep up with it."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROJECT
from independent_battery import Document, battery

from lm_eval_lora_ensemble import metrics
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import METRICS, metric

MEANING = {"family": "calibration", "direction": "", "range": "0–1", "definition": "none"}


def constant(predictions):
    return np.zeros(predictions.n_documents)


def built_in() -> set[str]:
    return {one.name for one in METRICS.values() if one.built_in}


def test_the_independent_battery_covers_every_metric():
    documents = [Document(np.array([[0.0, 1.0], [1.0, 0.5]]), gold) for gold in (0, 1, 1)]
    assert set(battery(documents)) == built_in()


def test_the_tables_of_the_documentation_have_every_metric(docs_module):
    tables = docs_module("tables.metrics")
    page = (PROJECT / "docs" / "metrics.md").read_text(encoding="utf-8")
    listed = "".join(tables.table(file) for file in ("accuracy", "calibration", "information", "selection"))
    assert listed.count("\n") == 8 + len({one.definition for one in METRICS.values() if one.built_in})
    assert all(line in page for line in listed.splitlines())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ece", r"'ece' is registered by lm_eval_lora_ensemble\.metrics\.definitions\.calibration already"),
        ("members", "cannot be called 'members'"),
        ("nll_stderr", "cannot be called"),
        ("my metric", "cannot be called 'my metric'"),
    ],
)
def test_names_that_cannot_be_had_are_refused(name, message):
    before = dict(METRICS)
    with pytest.raises(EnsembleError, match=message):
        metric(name=name, per_document=True, **MEANING)(constant)
    assert dict(METRICS) == before


def test_what_needs_no_gold_is_measured_without_one():
    blind = Predictions.from_scores(np.random.default_rng(0).normal(size=(3, 20, 4)), None)
    names = [one.name for one in METRICS.values() if not one.needs_gold and one.built_in]
    found = Battery(blind, metrics=names)(np.ones((1, 20)))
    assert list(found) == names and "mutual_information" in names
    assert all(np.isfinite(values).all() for values in found.values())
    for name in built_in() - set(names):
        with pytest.raises(EnsembleError, match="gold answers are needed"):
            Battery(blind, metrics=[name])


def test_what_needs_members_is_undefined_for_one_and_nothing_else_is():
    rng = np.random.default_rng(0)
    alone = Predictions.from_scores(rng.normal(size=(1, 50, 4)), rng.integers(0, 4, 50))
    found = Battery(alone)(np.ones((1, 50)))
    undefined = {name for name, values in found.items() if np.isnan(values).any()}
    assert undefined & built_in() == {
        one.name for one in METRICS.values() if one.needs_members and one.built_in
    }


def test_lower_and_upper_limits_are_kept():
    """Each range of the table, on documents from certain and right to certain and wrong."""
    rng = np.random.default_rng(1)
    for scale in (0.1, 3.0, 300.0):
        p = Predictions.from_scores(rng.normal(size=(4, 60, 3)) * scale, rng.integers(0, 3, 60))
        for name, values in Battery(p)(rng.integers(1, 3, (5, 60)).astype(float)).items():
            low, high = LIMITS.get(METRICS[name].range, (-np.inf, np.inf))
            assert np.nanmin(values) >= low - 1e-9 and np.nanmax(values) <= high + 1e-9, name
    assert {METRICS[name].range for name in built_in()} <= {*LIMITS, ""}


LIMITS = {
    "0–1": (0, 1),
    "0–2": (0, 2),
    "0–∞": (0, np.inf),
    "−1–1": (-1, 1),
    "−¼–1": (-0.25, 1),
    "0–ln C": (0, np.log(3)),
    "0–ln min(N, C)": (0, np.log(3)),
    "0–1, chance ½": (0, 1),
}


def distribution(folder, name: str, code: str) -> None:
    """Put an installed distribution that registers metrics into ``folder``."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lm_eval_lora_ensemble.metrics]\n{name} = {name}\n")


def test_other_distributions_metrics_come_last_and_broken_ones_are_left_out_with_a_warning(tmp_path):
    working = (
        "import numpy as np\n"
        "from lm_eval_lora_ensemble.metrics.registry import metric\n"
        f"@metric(per_document=True, **{MEANING!r})\n"
        "def third_party(predictions):\n    return np.ones(predictions.n_documents)\n"
    )
    distribution(tmp_path, "working_metrics", working)
    distribution(tmp_path, "broken_metrics", "import nothing_of_this_name\n")
    distribution(tmp_path, "greedy_metrics", working.replace("third_party", "ece"))
    code = (
        "import working_metrics\n"
        "from lm_eval_lora_ensemble.metrics.registry import METRICS\n"
        "print(list(METRICS)[0], list(METRICS)[-1], METRICS['ece'].built_in)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.split() == ["accuracy", "third_party", "True"]
    assert "broken_metrics cannot be loaded (ModuleNotFoundError" in done.stderr
    assert "greedy_metrics cannot be loaded (EnsembleError" in done.stderr


def test_metrics_need_neither_torch_nor_files_nor_argparse():
    code = (
        "import sys; import lm_eval_lora_ensemble.metrics.registry as r; len(r.METRICS)\n"
        "from lm_eval_lora_ensemble.metrics import detection, retention, recalibration, conformal, ensemble_size\n"
        "print(sorted({'torch', 'lm_eval', 'lm_eval_lora_ensemble.disk'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_public_name_hides_a_module():
    for module in pkgutil.iter_modules(metrics.__path__, f"{metrics.__name__}."):
        imported = importlib.import_module(module.name)
        assert getattr(metrics, module.name.rpartition(".")[2]) is imported
    assert all(getattr(metrics, name).__doc__ for name in metrics.__all__)
