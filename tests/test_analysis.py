"""From saved samples to the result, the table and the JSON file."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.analysis.comparison import compare, why_not_compared
from lm_eval_lora_ensemble.analysis.evaluation import evaluate, macro_mean
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.run import Run
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import Bootstrapped, ResamplingPlan, bootstrap
from lm_eval_lora_ensemble.metrics.choices import choice_probabilities
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import METRICS

QUICK = Settings(resamples=50)


def predictions(task, seed, d=60, n=3):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(d, 4)) * 2
    gold = (choice_probabilities(base).cumsum(1) > rng.uniform(size=(d, 1))).argmax(1)
    return Predictions.from_scores(base + rng.normal(size=(n, d, 4)), gold, subjects=task)


@pytest.fixture
def run():
    tasks = {task: predictions(task, seed, d) for task, seed, d in (("a", 0, 60), ("b", 1, 90), ("c", 2, 50))}
    return Run("run", "", {"model": "hf"}, tasks, {"ab": ("a", "b")})


def test_groups_are_pooled_and_macro_stands_beside(run):
    result = evaluate(run, settings=QUICK)
    assert list(result.tasks) == ["ab", "c", "a", "b"]
    group = result.tasks["ab"]
    pooled = Battery(run.predictions("ab"))(np.ones((1, 150)))
    each = [Battery(run.tasks[t])(np.ones((1, run.tasks[t].n_documents))) for t in "ab"]
    assert group.clustered
    assert group.documents == 150
    for metric in METRICS:
        assert group.metrics[metric].ensemble.value == pytest.approx(pooled[metric][0])
        assert group.metrics[metric].macro.value == pytest.approx(np.mean([e[metric][0] for e in each]))
    assert result.tasks["a"].metrics["ece"].macro is None


def test_ensemble_members_and_their_difference(run):
    found = evaluate(run, settings=QUICK).tasks["c"].metrics["nll"]
    every = np.ones((1, 50))
    singles = [Battery(run.tasks["c"].only([m]))(every)["nll"][0] for m in range(3)]
    assert found.members == pytest.approx(singles)
    assert found.member_mean.value == pytest.approx(np.mean(singles))
    assert found.difference.value == pytest.approx(found.ensemble.value - np.mean(singles))
    assert found.difference.quoted[1] < 0


def test_out_of_domain_and_calibration_tasks(run):
    result = evaluate(run, ood=["c"], calibrate="a", settings=QUICK)
    assert list(result.detection) == ["ab"]
    assert set(result.detection["ab"]["c"]) == {
        "max_probability",
        "entropy",
        "expected_entropy",
        "mutual_information",
    }
    assert set(result.recalibration) == {"b", "c"}
    first = result.recalibration["b"][0]
    assert first.order == "pool_then_calibrate"
    assert first.change["accuracy"].value == 0
    with pytest.raises(EnsembleError, match="no samples of 'x'"):
        evaluate(run, ood=["x"], settings=QUICK)
    with pytest.raises(EnsembleError, match="no task besides"):
        evaluate(run, ood=["ab", "c"], settings=QUICK)


def test_a_task_without_gold_answers_can_still_be_out_of_domain(run):
    c = run.tasks["c"]
    blind = Predictions(c.log_probabilities, c.counts, None, c.subjects, c.documents, "not logged")
    result = evaluate(Run("run", "", {}, {**run.tasks, "c": blind}), ood=["c"], settings=QUICK)
    assert "not logged" in result.skipped["c"]
    assert "c" in result.detection["a"]


def test_the_same_seed_gives_the_same_result_and_json_is_strict(run):
    one, two = (evaluate(run, settings=QUICK).to_dict() for _ in range(2))
    text = json.dumps(one, allow_nan=False)
    assert text == json.dumps(two, allow_nan=False)


def test_runs_compared_on_the_same_documents_only(run):
    noisy = {
        task: p.with_log_probabilities(np.log(choice_probabilities(p.log_probabilities * 0.3)))
        for task, p in run.tasks.items()
    }
    other = Run("other", "", {}, noisy)
    compared = compare(other, run, QUICK)
    assert set(compared) == {"a", "b", "c"}
    found = compared["a"]
    assert found.difference["confidence"].value < 0
    assert 0 < found.total_variation.value < 1
    same = compare(run, run, QUICK)["a"]
    assert same.agreement.value == 1
    assert all(math.isnan(e.value) or e.value == 0 for e in same.difference.values())
    with pytest.raises(EnsembleError, match="same documents"):
        compare(run, Run("short", "", {}, {"a": run.tasks["a"].take(np.arange(10))}), QUICK)
    with pytest.raises(EnsembleError, match="no task in common"):
        compare(run, Run("else", "", {}, {"z": run.tasks["a"]}), QUICK)
    unknown = replace(run.tasks["b"], is_gold=None)
    assert set(compare(run, Run("half", "", {}, {**run.tasks, "b": unknown}), QUICK)) == {"a", "c"}
    with pytest.raises(
        EnsembleError, match="no task in common that can be compared; b: right answers are unknown"
    ):
        compare(run, Run("none", "", {}, {"b": unknown}), QUICK)
    short = Run("part", "", {}, {**run.tasks, "b": run.tasks["b"].take(np.arange(10))})
    assert set(compare(run, short, QUICK)) == {"a", "c"}
    assert why_not_compared(run, short)["b"].endswith(
        "90 against 10; run both with the same tasks, --limit and --samples"
    )


def test_a_comparison_says_that_the_runs_were_not_asked_alike(run):
    asked = {name: {"version": 1.0, "few-shot examples": 0} for name in run.tasks}
    plain = replace(run, protocols=asked)
    other = replace(run, protocols={**asked, "a": {"version": 2.0, "few-shot examples": 25}})
    notes = {name: found.note for name, found in compare(plain, other, QUICK).items()}
    assert notes["a"] == "a was not asked alike: few-shot examples 0 and 25; version 1.0 and 2.0"
    assert notes["ab"].startswith("ab was not asked alike") and notes["b"] == notes["c"] == ""
    assert not any(found.note for found in compare(plain, run, QUICK).values())  # nothing is known of one


def test_a_macro_mean_of_tasks_with_fewer_resamples_each_takes_as_many_as_all_have():
    rng = np.random.default_rng(0)
    parts = []
    for documents, resamples in ((40, 300), (60, 200)):
        values = rng.normal(size=documents)
        plan = ResamplingPlan(documents, resamples)
        parts.append(bootstrap(lambda w, v=values: {"x": w @ v / w.sum(axis=1)}, plan))
    found, tasks = macro_mean("x", parts, 0.95)
    assert tasks == 2
    assert found.value == pytest.approx(np.mean([part.value["x"] for part in parts]))
    both = np.mean([part.resampled["x"][:200] for part in parts], axis=0)
    assert found.percentile == pytest.approx(tuple(np.quantile(both, [0.025, 0.975])))


def part(values, weights=None):
    """A task on three documents: its metric on them, and under three resamples."""
    plan = ResamplingPlan(3, 3)
    drawn = np.array(values[1:])
    return Bootstrapped(plan, {"x": values[0]}, {"x": drawn}, {"x": np.array([values[0]] * 3)})


def test_a_macro_mean_leaves_out_what_is_undefined_and_nothing_else():
    nan, inf = float("nan"), float("inf")
    found, tasks = macro_mean("x", [part([1.0, 1.0, nan, 1.2]), part([3.0, nan, 3.0, 3.2])], 0.5)
    assert (found.value, tasks) == (2.0, 2)
    # two of three resamples lack one task, none lacks both: their means are 1, 3 and 2.2
    assert found.percentile == pytest.approx(tuple(np.quantile([1.0, 3.0, 2.2], [0.25, 0.75])))
    endless, tasks = macro_mean("x", [part([1.0, 1.0, 1.0, 1.0]), part([inf, inf, inf, inf])], 0.5)
    assert (endless.value, tasks) == (inf, 2)
    assert math.isnan(endless.quoted[0])
    nothing, tasks = macro_mean("x", [part([nan] * 4)], 0.5)
    assert math.isnan(nothing.value) and tasks == 0


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for task in ("a", "b"):
        with (tmp_path / f"samples_{task}_2026-01-02T03-04-05.6.jsonl").open("w") as stream:
            for d in range(30):
                line = {
                    "doc_id": d,
                    "target": "1",
                    "members": rng.normal(size=(3, 4)).tolist(),
                    "arguments": {},
                }
                stream.write(json.dumps(line) + "\n")
    return tmp_path


def test_the_command_prints_a_table_and_writes_json(folder, capsys):
    out = folder / "out.json"
    arguments = ["analyse", str(folder), "--ood", "b", "--calibrate", "b", "--resamples", "20"]
    assert cli.main([*arguments, "--json", str(out), "--bins", "10"]) == 0
    printed = capsys.readouterr().out
    for words in ("a: 30 documents", "ece ↓", "10 bins", "Out-of-domain", "calibrate_then_pool", "conformal"):
        assert words in printed
    written = json.loads(out.read_text(encoding="utf-8"))
    found = written["runs"][0]
    assert found["members"] == 3
    assert found["settings"]["resamples"] == 20
    assert found["tasks"]["a"]["metrics"]["nll"]["ensemble"]["value"] > 0
    assert [p.name for p in folder.glob(".*")] == []


def test_the_command_says_what_is_wrong_in_one_line(folder, capsys):
    for arguments, words in (
        ([str(folder / "none")], "neither a folder"),
        ([str(folder), "--ood", "z"], "no samples of 'z'"),
        ([str(folder), "--json", str(folder / "no" / "x.json")], "create it first"),
        ([str(folder), "--bins", "0", "--resamples", "2"], "at least one bin"),
    ):
        assert cli.main(["analyse", *arguments]) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1


def test_a_second_run_is_compared_with_the_first(folder, tmp_path, capsys):
    other = tmp_path / "again"
    other.mkdir()
    for path in folder.glob("samples_*"):
        (other / path.name.replace("03-04", "04-04")).write_bytes(path.read_bytes())
    first = folder / "samples_a_2026-01-02T03-04-05.6.jsonl"
    second = next(other.glob("samples_a_*"))
    assert cli.main(["analyse", str(first), str(second), "--resamples", "20"]) == 0
    assert "paired" in capsys.readouterr().out
    different = second.rename(second.with_name(second.name.replace("samples_a", "samples_z")))
    written = tmp_path / "found.json"
    assert cli.main(["analyse", str(first), str(different), "--resamples", "20", "--json", str(written)]) == 0
    assert "Not compared:" in capsys.readouterr().out
    assert len(json.loads(written.read_text())["runs"]) == 2


def test_a_trial_beside_the_whole_run_and_a_run_without_golds_stop_nothing(folder, capsys):
    """The first documents of one task once more, and a task of which nobody knows the right answers."""
    whole = next(folder.glob("samples_a_*"))
    trial = folder / "trial"
    trial.mkdir()
    for name, lines in (("a", 10), ("c", 30)):
        (trial / whole.name.replace("samples_a", f"samples_{name}")).write_text(
            "".join(whole.read_text().splitlines(keepends=True)[:lines])
        )
    unknown = folder / "unknown"
    unknown.mkdir()
    (unknown / whole.name).write_text(whole.read_text().replace('"target": "1"', '"target": "?"'))
    assert cli.main(["analyse", str(folder), "--resamples", "20", "--json", str(folder / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "Not compared: " in printed and "10 against 30" in printed
    assert f"left out: {unknown}: no task has gold answers" in printed
    assert len(json.loads((folder / "out.json").read_text())["runs"]) == 2
    assert cli.main(["analyse", str(unknown), "--resamples", "20"]) == 2


def test_a_samples_file_named_beside_its_folder_is_one_run(folder, capsys):
    file = next(folder.glob("samples_a_*"))
    for places in ([file, folder], [folder, file]):
        assert cli.main(["analyse", *map(str, places), "--resamples", "20"]) == 0
        assert "minus" not in capsys.readouterr().out


def test_a_file_that_cannot_be_one_is_named_before_the_work(folder, capsys):
    for words, message in (
        (["--json", str(folder)], "is a folder; name a file"),
        (["--seed", "-1"], "seed is -1; a whole number of at least 0 is needed"),
    ):
        assert cli.main(["analyse", str(folder), *words]) == 2
        said = capsys.readouterr()
        assert message in said.err and not said.out


def test_one_name_is_no_list_of_names(run):
    with pytest.raises(EnsembleError, match=r"ood='ab': give a list of names"):
        evaluate(run, ood="ab", settings=QUICK)


def test_a_run_is_shown_in_a_line(run):
    assert repr(run) == "Run('run', '', tasks=['a', 'b', 'c'], groups=['ab'])"
