"""Declared distributions from the command line down: the same numbers in lm-eval's table, analyse and the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from harness_tasks import WORDS
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lm_eval_lora_ensemble import cli, load_runs
from lm_eval_lora_ensemble.analysis.arguments import primary_distribution
from lm_eval_lora_ensemble.analysis.distribution import Distribution
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.scales import SCALES, by_scale
from lm_eval_lora_ensemble.ensemble.calibration import fit_calibration
from lm_eval_lora_ensemble.ensemble.manifest import Manifest, MemberEntry
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.metrics.battery import Battery

N_DOCUMENTS = 120
TWINS = ("nll", "brier_score", "ece", "predictive_entropy", "mutual_information")


def write_long_answers(folder: Path) -> Path:
    """A task that reports acc_norm, with answers of very different lengths."""
    draw = np.random.default_rng(5)
    rows = []
    for i in range(N_DOCUMENTS):
        choices = [" ".join(draw.choice(WORDS, size=1 + (i + c) % 5)) + f" {c}" for c in range(3 + i % 2)]
        rows.append({"question": f"Number {i}: which?", "choices": choices, "gold": int(draw.integers(3))})
    data = folder / "long_answers.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "long_answers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": m, "aggregation": "mean"} for m in ("acc", "acc_norm")],
    }
    (folder / "long_answers.yaml").write_text(yaml.safe_dump(task))
    return folder


def calibrated(ensemble: Path, base: Path, folder: Path) -> Path:
    """The ensemble with a manifest that has temperatures from some validation split."""
    import shutil

    target = Path(shutil.copytree(ensemble, folder / "calibrated"))
    draw = np.random.default_rng(1)
    scores, lengths = draw.normal(size=(3, 60, 4)) * 5, draw.integers(3, 30, (60, 4))
    calibration = fit_calibration(
        "some_task", "validation", scores, np.eye(4, dtype=bool)[draw.integers(0, 4, 60)], lengths
    )
    members = [MemberEntry(path.name, path.name) for path in sorted(target.iterdir())]
    Manifest(str(base), None, members, calibration=calibration).write(target)
    return target


def evaluate_and_save(folder: Path, output: Path, **model: object) -> dict:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tracker = EvaluationTracker(output_path=str(output))
    lm = LoraEnsembleLM(device="cpu", **model)
    results = simple_evaluate(
        model=lm,
        tasks=["long_answers"],
        task_manager=manager,
        evaluation_tracker=tracker,
        model_args=dict(model),
    )
    samples = results.pop("samples")
    results["config"]["model"] = "lora-ensemble"
    tracker.save_results_aggregated(results=results, samples=samples)
    return results["results"]["long_answers"]


@pytest.fixture(scope="module")
def saved(ensemble, llama, tmp_path_factory):
    """Two runs of one calibrated ensemble, and their tables: cross-fitted, and on the scale from validation."""
    folder = tmp_path_factory.mktemp("scales")
    write_long_answers(folder)
    adapters = str(calibrated(ensemble, llama, folder))
    rows = {
        t: evaluate_and_save(folder, folder / t, adapters=adapters, temperature=t)
        for t in ("crossfit", "validation")
    }
    return folder, rows


@pytest.mark.parametrize("temperature", ["crossfit", "validation"])
def test_lm_evals_table_and_analyse_agree(saved, temperature):
    folder, rows = saved
    (run,) = load_runs(folder / temperature)
    predictions = run.under(Distribution("chars", temperature)).predictions("long_answers")
    values = Battery(predictions, metrics=TWINS)(np.ones((1, N_DOCUMENTS)))
    for name in TWINS:
        assert rows[temperature][f"{name}_norm,none"] == pytest.approx(float(values[name][0]), abs=1e-9), name
    assert (rows["crossfit"]["nll_norm,none"] != rows["validation"]["nll_norm,none"]) and np.isfinite(
        rows[temperature]["temperature_norm,none"]
    )
    # the contract: the plain names stay those of summed scores
    raw = Battery(run.predictions("long_answers"), metrics=TWINS)(np.ones((1, N_DOCUMENTS)))
    assert rows[temperature]["nll,none"] == pytest.approx(float(raw["nll"][0]), abs=1e-9)


def test_the_flags_choose_what_is_judged(saved, tmp_path, capsys):
    folder, rows = saved
    file = tmp_path / "out.json"
    command = ["analyse", str(folder / "crossfit"), "--resamples", "20", "--json", str(file)]
    assert cli.main([*command, "--scores", "chars", "--temperature", "crossfit"]) == 0
    said = capsys.readouterr().out
    assert "choices' scores per character, T cross-fitted on the task's own answers (oracle)" in said
    assert "long_answers: by the scale of its scores" in said
    (result,) = json.loads(file.read_text())["runs"]
    assert result["distribution"] == {"scores": "chars", "temperature": "crossfit"}
    value = result["tasks"]["long_answers"]["metrics"]["ece"]["ensemble"]["value"]
    assert value == pytest.approx(rows["crossfit"]["ece_norm,none"], abs=1e-9)
    assert len(result["scales"]["long_answers"]) == len(SCALES)


def test_a_members_own_row_is_what_its_own_run_prints(saved):
    """A single member is judged on its own T; the shared one serves the decomposition."""
    folder, _ = saved
    (run,) = load_runs(folder / "crossfit")
    chars = Distribution("chars", "crossfit")
    together = run.under(chars).predictions("long_answers")
    for m in range(3):
        from dataclasses import replace

        alone = replace(run, scores={"long_answers": run.scores["long_answers"].only([m])})
        alone = replace(alone, tasks={n: s.predictions() for n, s in alone.scores.items()}).under(chars)
        np.testing.assert_allclose(
            together.member(m).mixture, alone.predictions("long_answers").mixture, atol=1e-9
        )


def test_the_report_takes_the_scale_from_validation_where_all_runs_have_it(saved, tmp_path):
    folder, rows = saved
    (run,) = load_runs(folder / "validation")
    assert primary_distribution([run]) == Distribution("chars", "validation")
    target = tmp_path / "report"
    assert (
        cli.main(
            [
                "report",
                str(folder / "validation"),
                "--output",
                str(target),
                "--resamples",
                "20",
                "--figures",
                "1",
            ]
        )
        == 0
    )
    data = json.loads((target / "report.json").read_text())
    assert data["distribution"] == {"scores": "chars", "temperature": "validation"}
    (board,) = data["leaderboard"]
    ensemble = next(row for row in board["rows"] if row["kind"] == "ensemble")
    assert ensemble["cells"]["nll"]["value"] == pytest.approx(rows["validation"]["nll_norm,none"], abs=1e-9)
    page = (target / "report.html").read_text()
    assert (
        "What the scale of the scores changes" in page
        and "an oracle that cannot show over-confidence" in page
    )


def test_by_scale_is_the_battery_under_each_scale(saved):
    folder, _ = saved
    (run,) = load_runs(folder / "crossfit")
    for scale, distribution in zip(
        by_scale(run, "long_answers", Settings(resamples=20)), SCALES, strict=True
    ):
        assert not scale.undefined
        p = run.under(distribution).predictions("long_answers")
        assert scale.ensemble["nll"].value == pytest.approx(-p.log_gold_mass.mean())
        alone = np.mean([-p.member(m).log_gold_mass.mean() for m in range(3)])
        assert scale.difference["nll"].value == pytest.approx(-p.log_gold_mass.mean() - alone)


def test_a_scale_that_a_task_lacks_is_told_by_its_own_reason():
    (run,) = load_runs(Path(__file__).parent / "data" / "release_0_1_0" / "results")
    for name, documents in (("plain_a", 17), ("plain_b", 5)):
        *_, crossfit = by_scale(run, name, Settings(resamples=5))
        assert f"for {name}: {documents} documents outside a fold" in crossfit.undefined


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "validation"], "no temperature for scores=sum in the results file"),
        (["--temperature", "nowhere"], "give 1, crossfit, validation, or one of the run's tasks"),
        (["--scores", "tokens", "--temperature", "crossfit"], "do not say how many tokens a choice has"),
    ],
)
def test_a_scale_that_is_not_there_is_refused_in_one_line(arguments, said, capsys):
    old = Path(__file__).parent / "data" / "release_0_1_0" / "results"
    assert cli.main(["analyse", str(old), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1


def test_a_temperature_fitted_on_a_task_is_applied_to_the_others():
    (run,) = load_runs(Path(__file__).parent / "data" / "release_0_1_0" / "results")
    scaled = run.under(Distribution("sum", "plain_a"))
    raw, other = run.predictions("plain_b").log_probabilities, scaled.predictions("plain_b").log_probabilities
    ratio = (raw[..., 0] - raw[..., 1]) / (other[..., 0] - other[..., 1])
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
    assert ratio[0, 0] > 1  # this random model is far too sure


@pytest.mark.parametrize(
    ("value", "said"), [("hot", "use crossfit or validation"), ("validation", "has no temperature")]
)
def test_the_model_refuses_a_temperature_it_does_not_have(ensemble, value, said):
    with pytest.raises(EnsembleError, match=said):
        LoraEnsembleLM(adapters=str(ensemble), device="cpu", temperature=value)
