"""Scores per length and their cross-fitted scale: lm-eval's table, `analyse`, and an independent computation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import harness_tasks
import independent_battery as independent
import numpy as np
import pytest
import scipy.special
import scipy.stats
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from two_processes import in_two_processes

from lm_eval_lora_ensemble.analysis.distribution import Distribution
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.harness.state import UncertaintyState
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.conformal import conformal_sets
from lm_eval_lora_ensemble.metrics.crossfit import crossfit
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.proper_scores import brier_score, negative_loglikelihood
from lm_eval_lora_ensemble.metrics.temperature import fit_temperature_of_mixture

TWINS = ("nll", "brier_score", "ece", "predictive_entropy", "mutual_information")
ASKED = ("accuracy", "rms_ce", "expected_entropy", "classwise_ece")
METRICS = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
CROSSFITTED = Distribution("chars", "crossfit")
OURS = "class: !function lm_eval_lora_ensemble.harness.UncertaintyTask\n"


def write(folder: Path, name: str, rows: list[dict], extra: str = "", **config: object) -> None:
    stock = {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
    harness_tasks._task(folder, name, rows, **{**stock, "metric_list": METRICS, **config})
    with (folder / f"{name}.yaml").open("a") as stream:
        stream.write(extra)


def drawn(seed: int, n: int) -> list[dict]:
    draw = np.random.default_rng(seed)
    return [harness_tasks._row(draw, n_choices=int(draw.integers(2, 5))) for _ in range(n)]


def evaluate(model, tasks, folder, **kwargs):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=model, tasks=tasks, task_manager=manager, **kwargs)


def answered(model, folder: Path, rows: list[dict], share: float) -> list[dict]:
    """Return the rows with the answer that the model gives per character in about ``share`` of them."""
    write(folder, "unanswered", rows)
    samples = evaluate(model, ["unanswered"], folder)["samples"]["unanswered"]
    draw = np.random.default_rng(3)
    for row, sample in zip(rows, samples, strict=True):
        per_character = np.array(sample["members"]) / [len(c) for c in row["choices"]]
        believed = int(scipy.special.softmax(per_character, axis=1).mean(axis=0).argmax())
        row["gold"] = believed if draw.random() < share else int(draw.integers(len(row["choices"])))
    return rows


def save(found: dict, folder: Path) -> Path:
    """Write a run's files as lm-eval does."""
    samples = found["samples"]
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.model_name_sanitized = "model"
    results = {key: value for key, value in found.items() if key != "samples"}
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, of_task in samples.items():
        tracker.save_results_samples(task_name=task, samples=of_task)
    return folder


@pytest.fixture(scope="module")
def model(ensemble):
    return LoraEnsembleLM(adapters=str(ensemble), device="cpu")


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    found = answered(model, tmp_path_factory.mktemp("unanswered"), drawn(17, 130), 0.5)
    return [found[0], *found]  # a duplicate


@pytest.fixture(scope="module")
def folder(rows, model, tmp_path_factory):
    place = tmp_path_factory.mktemp("long")
    asked = f"uncertainty: {{metrics: [{', '.join(f'{name}_norm' for name in ASKED)}]}}\n"
    write(place, "long_a", rows, OURS + asked)
    write(place, "long_b", answered(model, tmp_path_factory.mktemp("b"), drawn(19, 120), 0.4))
    several = [{**row, "gold": sorted({0, row["gold"]})} for row in rows]
    write(place, "several", several, metric_list=METRICS)
    listed = {"group": "long", "task": ["long_a", "long_b"]}
    listed["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (place / "long.yaml").write_text(yaml.safe_dump(listed))
    return place


@pytest.fixture(scope="module")
def found(model, folder):
    return evaluate(model, ["long", "several"], folder, bootstrap_iters=10)


@pytest.fixture(scope="module")
def run(found, tmp_path_factory):
    (one,) = load_runs(save(found, tmp_path_factory.mktemp("saved")))
    return one


@pytest.mark.parametrize(("task", "more"), [("long_a", ASKED), ("long_b", ())])
def test_every_twin_follows_from_the_samples(found, task, more):
    row = found["results"][task]
    documents, temperatures = independent.crossfitted(found["samples"][task])
    expected = independent.battery(documents)
    for name in (*TWINS, *more):
        assert row[f"{name}_norm,none"] == pytest.approx(expected[name], abs=1e-6), name
    mean = np.exp(np.log(temperatures).mean())
    assert row["temperature_norm,none"] == pytest.approx(mean, rel=1e-6)
    assert len(set(temperatures)) == 5
    assert abs(row["nll_norm,none"] - row["nll,none"]) > 0.1
    assert ("accuracy_norm,none" in row) is bool(more)


def test_several_golds_count_in_every_twin(found):
    samples, row = found["samples"]["several"], found["results"]["several"]
    golds = [s["golds"] for s in samples]
    assert {len(those) for those in golds} == {1, 2}
    documents, temperatures = independent.crossfitted(samples)
    expected = independent.of_several_golds(documents, golds)
    for name in ("nll", "brier_score", "ece"):
        assert row[f"{name}_norm,none"] == pytest.approx(expected[name], abs=1e-6), name
    assert row["temperature_norm,none"] == pytest.approx(np.exp(np.log(temperatures).mean()), rel=1e-6)
    raw = independent.of_several_golds(
        [independent.Document(np.array(s["members"]), 0) for s in samples], golds
    )
    for name in ("nll", "brier_score", "ece"):
        assert row[f"{name},none"] == pytest.approx(raw[name], abs=1e-6), name


def test_the_table_and_analyse_agree(found, run):
    judged = run.under(CROSSFITTED)
    for name in ("long_a", "long_b", "several", "long"):
        predictions = judged.predictions(name)
        battery = Battery(predictions, metrics=TWINS)(np.ones((1, predictions.n_documents)))
        for metric in TWINS:
            shown = found["results"][name][f"{metric}_norm,none"]
            assert shown == pytest.approx(battery[metric][0], abs=1e-9), (name, metric)
    macro = np.mean([found["results"][task]["ece_norm,none"] for task in ("long_a", "long_b")])
    assert found["results"]["long"]["ece_norm_macro,none"] == pytest.approx(macro)


def test_the_order_of_documents_does_not_show(run):
    """Ranks log documents in another order than one process; T must not see it in the ninth digit."""
    scores, order = run.scores["long_a"], np.random.default_rng(0).permutation(131)
    raw = scores.per_unit("chars")
    here, there = crossfit(raw, scores.folds), crossfit(raw.take(order), scores.folds[order])
    np.testing.assert_allclose(there.temperatures, here.temperatures[order], rtol=1e-11)


def test_standard_errors_are_those_given_the_scale(found, run):
    row = found["results"]["long_a"]
    predictions = run.under(CROSSFITTED).predictions("long_a")
    losses = negative_loglikelihood(predictions.mixture, predictions.is_gold)
    assert row["nll_norm_stderr,none"] == pytest.approx(scipy.stats.sem(losses), abs=1e-9)
    assert row["ece_norm_stderr,none"] == row["temperature_norm_stderr,none"] == "N/A"


def test_one_gold_moves_only_the_documents_of_other_folds(run):
    scores = run.scores["long_a"]
    changed = scores.is_gold.copy()
    changed[5] = np.roll(changed[5, : scores.counts[5]], 1).tolist() + [False] * (4 - scores.counts[5])
    other = Predictions.from_scores(scores.per_unit("chars").log_probabilities, changed, counts=scores.counts)
    before = crossfit(scores.per_unit("chars"), scores.folds).temperatures
    after = crossfit(other, scores.folds).temperatures
    same_fold = scores.folds == scores.folds[5]
    # the second scores were normalised once more, which rounds
    np.testing.assert_allclose(after[same_fold], before[same_fold], rtol=1e-9)
    assert (abs(after / before - 1)[~same_fold] > 1e-5).all()


def test_duplicates_share_a_fold_and_members_a_scale(found, run):
    first, second = found["samples"]["long_a"][:2]
    assert first["doc_hash"] == second["doc_hash"] and first["fold"] == second["fold"]
    predictions = run.under(CROSSFITTED).predictions("long_a")
    entropy = scipy.stats.entropy(predictions.mixture, axis=1)
    each = scipy.stats.entropy(predictions.probabilities, axis=2).mean(axis=0)
    assert (entropy - each > -1e-12).all() and (entropy - each).max() > 1e-3


def test_a_run_is_judged_by_one_distribution_after_another(run):
    few = run.under(CROSSFITTED).under(Distribution("chars", "long_b")).under(Distribution())
    assert list(few.tasks) == list(run.tasks) and few.groups == run.groups and few.skipped == run.skipped
    assert (few.tasks["long_a"].mixture == run.tasks["long_a"].mixture).all()
    fitted = run.under(Distribution("chars", "long_b")).tasks["long_b"]
    unscaled = run.scores["long_b"].per_unit("chars")
    assert fitted.log_gold_mass.mean() > unscaled.log_gold_mass.mean()


def test_tokens_count_where_they_were_logged(run, tmp_path):
    assert run.under(Distribution("tokens")).tasks
    file = Path(run.files["long_a"])
    lines = [json.loads(line) for line in file.open()]
    for line in lines:
        del line["lengths"], line["fold"]  # as release 0.1 wrote it
    (tmp_path / file.name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (older,) = load_runs(tmp_path)
    with pytest.raises(EnsembleError, match="long_a do not say how many tokens a choice has"):
        older.under(Distribution("tokens"))
    same = older.under(CROSSFITTED).tasks["long_a"].mixture
    assert (same == run.under(CROSSFITTED).tasks["long_a"].mixture).all()


@pytest.mark.long  # test_harness_tasks has two processes in the default suite
def test_two_processes_give_the_same_twins(found, ensemble, folder, tmp_path):
    lm_eval = ("-m", "lm_eval_lora_ensemble", "run", "--model", "lora-ensemble", "--device", "cpu")
    which = ("--model_args", f"adapters={ensemble}", "--tasks", "long", "--include_path", str(folder))
    files = ("--log_samples", "--output_path", str(tmp_path))
    in_two_processes(*lm_eval, *which, *files)
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    (two,) = load_runs(tmp_path)
    for name in ("long_a", "long_b", "long"):
        judged = two.under(CROSSFITTED).predictions(name)
        battery = Battery(judged, metrics=TWINS)(np.ones((1, judged.n_documents)))
        for metric in TWINS:
            value = results[name][f"{metric}_norm,none"]
            assert value == pytest.approx(found["results"][name][f"{metric}_norm,none"], abs=1e-5)
            assert value == pytest.approx(battery[metric][0], abs=1e-9)


def test_an_empty_choice_is_named_and_costs_the_twins_alone(model, tmp_path, caplog):
    """Hours of scoring may be behind the moment at which it shows."""
    rows = drawn(8, 5)
    rows[2]["choices"][1] = ""
    write(tmp_path, "t", rows)
    found = evaluate(model, ["t"], tmp_path, bootstrap_iters=0)["results"]["t"]
    assert re.search(r"task t: .* NaN: choice 1 of document 2 of t is empty", caplog.text)
    assert np.isnan(found["nll_norm,none"]) and np.isfinite(found["nll,none"])


def test_documents_of_an_older_cache_know_no_tokens(model, tmp_path, monkeypatch):
    """Part of the scores from a cache of release 0.1: twins need characters only."""
    write(tmp_path, "t", drawn(9, 6))
    stock = model.loglikelihood

    def older(requests, **kwargs):
        scores = stock(requests, **kwargs)
        for value, _ in scores[-7:]:
            value.tokens = None
        return scores

    monkeypatch.setattr(model, "loglikelihood", older)
    found = evaluate(model, ["t"], tmp_path, bootstrap_iters=0)
    known = ["tokens" in s["lengths"] for s in found["samples"]["t"]]
    assert any(known) and not all(known) and "nll_norm,none" in found["results"]["t"]


def test_a_task_without_a_scale_has_one_again_under_another(run, tmp_path):
    for task in ("long_a", "long_b"):
        file = Path(run.files[task])
        lines = [json.loads(line) for line in file.open()]
        kept = [{k: v for k, v in line.items() if task == "long_b" or k != "lengths"} for line in lines]
        (tmp_path / file.name).write_text("".join(json.dumps(line) + "\n" for line in kept))
    for results in Path(run.files["long_a"]).parent.glob("results_*.json"):
        (tmp_path / results.name).write_text(results.read_text())
    (both,) = load_runs(tmp_path)
    tokens = both.under(Distribution("tokens"))
    assert list(tokens.tasks) == ["long_b"] and "tokens" in tokens.skipped["long_a"] and not tokens.groups
    again = tokens.under(CROSSFITTED)
    assert list(again.tasks) == ["long_a", "long_b"] and again.groups == {"long": ("long_a", "long_b")}
    assert again.skipped == both.skipped


def test_each_of_two_models_keeps_its_own_scale_and_switch(model, ensemble, folder, tmp_path):
    def of(lm, **kwargs):
        return evaluate(lm, ["long_b"], folder, bootstrap_iters=0, **kwargs)["results"]["long_b"]

    crossfitted = of(model)
    silent = LoraEnsembleLM(adapters=str(ensemble), device="cpu", uncertainty_metrics=False)
    scaled = LoraEnsembleLM(adapters=str(ensemble), device="cpu", members=2)
    scaled._scale = 7.0  # as temperature=validation sets it
    assert "nll_norm,none" not in of(silent)
    assert of(scaled)["temperature_norm,none"] == pytest.approx(7)
    again = of(model)
    assert again["nll_norm,none"] == crossfitted["nll_norm,none"]
    assert again["temperature_norm,none"] == crossfitted["temperature_norm,none"]
    # a run whose answers all come from the cache asks the model for none
    cache = str(tmp_path / "cache")
    of(model, use_cache=cache)
    of(silent)
    assert of(model, use_cache=cache)["temperature_norm,none"] == crossfitted["temperature_norm,none"]


def test_four_documents_are_a_stated_nan(model, folder, caplog):
    row = evaluate(model, ["long_a"], folder, limit=4, bootstrap_iters=0)["results"]["long_a"]
    assert all(np.isnan(row[f"{name}_norm,none"]) for name in (*TWINS, *ASKED, "temperature"))
    others = [v for k, v in row.items() if isinstance(v, float) and "_norm" not in k]
    assert np.isfinite(others).all() and len(others) > 5
    assert "task long_a: its _norm metrics are NaN: " in caplog.text
    assert "documents outside a fold; 80 are needed" in caplog.text


def test_a_single_model_has_twins_in_our_tasks(llama, folder):
    row = evaluate(HFLM(pretrained=str(llama), device="cpu"), ["long_a"], folder)
    documents, _ = independent.crossfitted(row["samples"]["long_a"])
    expected = independent.battery(documents)
    for name in ("nll", "ece", "predictive_entropy"):
        assert row["results"]["long_a"][f"{name}_norm,none"] == pytest.approx(expected[name], abs=1e-6)
    assert row["results"]["long_a"]["mutual_information_norm,none"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("option", "letters", "expected"),
    [("", False, True), ("", True, False), ("true", True, True), ("false", False, False)],
)
def test_which_tasks_have_twins(model, tmp_path, option, letters, expected):
    rows = [
        {**row, "choices": list("ABCD")[: len(row["choices"])]} if letters else row for row in drawn(1, 6)
    ]
    write(tmp_path, "t", rows, OURS + (f"uncertainty: {{normalise: {option}}}\n" if option else ""))
    row = evaluate(model, ["t"], tmp_path, bootstrap_iters=0)["results"]["t"]
    assert ("nll_norm,none" in row) is expected


def test_contexts_have_no_length(model, tmp_path, caplog):
    rows = [{**row, "ending": "is a word"} for row in drawn(2, 6)]
    option = OURS + "uncertainty: {normalise: true}\n"
    write(tmp_path, "t", rows, option, doc_to_text="{{gold}}", doc_to_target="ending")
    row = evaluate(model, ["t"], tmp_path, bootstrap_iters=0)["results"]["t"]
    assert "nll_norm,none" not in row and "nll,none" in row
    assert "task t: its _norm metrics are left out: its choices are contexts" in caplog.text


def test_names_of_twins_are_checked():
    UncertaintyState(metrics=["rms_ce_norm", "temperature_norm"])
    with pytest.raises(EnsembleError, match="no metric 'acuracy_norm'; the nearest is 'accuracy_norm'"):
        UncertaintyState(metrics=["acuracy_norm"])


MC2 = """
import numpy as np

def process_results_mc2(doc, results):
    p = np.exp([score for score, _ in results])
    return {"acc": float(p[np.array(doc["mc2_targets"]["labels"]) == 1].sum() / p.sum())}
"""


def test_the_golds_of_truthfulqas_scoring_are_known(model, tmp_path):
    rows = [{**row, "mc2_targets": {"labels": [1, 1, 0, 0][: len(row["choices"])]}} for row in drawn(4, 8)]
    (tmp_path / "own.py").write_text(MC2)
    acc = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    extra = "process_results: !function own.process_results_mc2\n"
    write(tmp_path, "mc2", rows, extra, doc_to_target=0, metric_list=acc)
    found = evaluate(model, ["mc2"], tmp_path, bootstrap_iters=0)
    samples, row = found["samples"]["mc2"], found["results"]["mc2"]
    assert {tuple(s["golds"]) for s in samples} == {(0, 1)}
    expected = independent.of_several_golds(
        [independent.Document(np.array(s["members"]), 0) for s in samples], [s["golds"] for s in samples]
    )
    assert row["nll,none"] == pytest.approx(expected["nll"], abs=1e-6)
    assert row["ece,none"] == pytest.approx(expected["ece"], abs=1e-6)


# ------------------------------------------------------------------------------------- without a model


def simulated(n: int = 200, share: float = 0.6, seed: int = 0, *, right: bool = False) -> ChoiceScores:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(5, 60, size=(n, 4))
    scores = draw.normal(size=(3, n, 4)) * lengths / 8 - 2.0 * lengths
    best = (scores / lengths).mean(axis=0).argmax(axis=1)
    gold = np.where(right | (draw.random(n) < share), best, draw.integers(4, size=n))
    if right:
        scores[:, np.arange(n), best] += 30.0 * lengths[np.arange(n), best]
    return ChoiceScores.of(scores, np.eye(4, dtype=bool)[gold], lengths={"chars": lengths})


def test_all_right_has_no_scale_and_chance_a_flagged_one():
    certain = simulated(right=True)
    fitted = crossfit(certain.per_unit("chars"), certain.folds)
    assert "every answer is right" in fitted.undefined and np.isnan(fitted.temperatures).all()
    draw = np.random.default_rng(1)
    worst = simulated()
    least = np.eye(4, dtype=bool)[worst.per_unit("chars").mixture.argmin(axis=1)]
    chance = ChoiceScores.of(
        worst.loglikelihoods, least, lengths=worst.lengths, folds=draw.integers(5, size=200)
    )
    fitted = crossfit(chance.per_unit("chars"), chance.folds)
    assert fitted.at_upper_limit and not fitted.undefined and (fitted.temperatures == 100).all()


def test_a_gold_held_impossible_is_a_stated_nan():
    scores = simulated()
    gold = scores.is_gold[7].argmax()
    scores.loglikelihoods[:, 7, gold] = -np.inf
    assert crossfit(scores.per_unit("chars"), scores.folds).undefined == (
        "the gold answer of document 7 has probability 0"
    )


def test_an_empty_choice_is_named():
    scores = simulated()
    scores.lengths["chars"][3, 2] = 0
    with pytest.raises(EnsembleError, match=r"choice 2 of document 3 of .* is empty"):
        scores.per_unit("chars")


def test_the_temperature_is_the_independent_ones_with_several_golds():
    scores = simulated(seed=5)
    is_gold = scores.is_gold.copy()
    is_gold[::3, 0] = True
    z = scores.per_unit("chars").log_probabilities
    fitted = fit_temperature_of_mixture(z, is_gold)
    golds = [np.flatnonzero(g).tolist() for g in is_gold]
    expected = independent.mixture_temperature(list(z.transpose(1, 0, 2)), golds)
    assert fitted.temperature == pytest.approx(expected, rel=1e-7)


def test_scores_of_long_answers_find_their_scale():
    """Per character of answers of 2,000 characters T lies below 0.01, where the search once ended."""
    scores = simulated(seed=6)
    z = scores.per_unit("chars").log_probabilities
    expected = fit_temperature_of_mixture(z, scores.is_gold).temperature
    short = fit_temperature_of_mixture(z / 500, scores.is_gold)
    assert short.temperature == pytest.approx(expected / 500, rel=1e-9) and not short.at_limit


def test_a_conformal_set_that_holds_one_gold_holds_an_answer():
    scores = np.log([[[0.5, 0.3, 0.2]] * 9])
    several = Predictions.from_scores(scores, np.array([[False, True, True]] * 9))
    found = conformal_sets(several, several, alpha=0.5)
    assert found.threshold == pytest.approx(0.7)  # the least of 1 − 0.3 and 1 − 0.2
    assert found.covered.all() and found.mean_size == 2


@st.composite
def documents(draw):
    n, d, c = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(2, 5))
    scores = draw(arrays.arrays(np.float64, (n, d, c), elements=st.floats(-60, 0)))
    lengths = draw(arrays.arrays(np.int64, (d, c), elements=st.integers(1, 90)))
    golds = draw(arrays.arrays(np.bool_, (d, c)))
    golds[:, draw(st.integers(0, c - 1))] = True
    return scores, lengths, golds


@given(documents(), st.floats(-3, 3))
def test_a_constant_per_character_changes_nothing(drawn_documents, constant):
    """l + a · length is l / length + a: per length only; of sums, a constant per document changes nothing."""
    scores, lengths, golds = drawn_documents
    of = {"lengths": {"chars": lengths}}
    plain, moved = (ChoiceScores.of(s, golds, **of) for s in (scores, scores + constant * lengths))
    assert np.allclose(plain.per_unit("chars").mixture, moved.per_unit("chars").mixture, atol=1e-9)
    summed = ChoiceScores.of(scores + constant, golds)
    assert np.allclose(plain.per_unit().mixture, summed.per_unit().mixture, atol=1e-9)


@given(documents(), st.integers(2, 5))
def test_a_unit_of_length_is_a_temperature(drawn_documents, unit):
    scores, lengths, golds = drawn_documents
    in_chars = ChoiceScores.of(scores, golds, lengths={"chars": lengths * unit})
    in_units = ChoiceScores.of(scores, golds, lengths={"chars": lengths})
    longer = in_chars.predictions("chars", 1 / unit).mixture
    assert np.allclose(longer, in_units.predictions("chars").mixture, atol=1e-9)


@given(documents(), st.floats(0.05, 20), st.randoms(use_true_random=False))
def test_members_are_exchangeable_and_the_brier_score_bounded(drawn_documents, t, random):
    scores, lengths, golds = drawn_documents
    order = list(range(len(scores)))
    random.shuffle(order)
    one = ChoiceScores.of(scores, golds, lengths={"chars": lengths})
    judged, shuffled = one.predictions("chars", t), one.only(order).predictions("chars", t)
    assert np.allclose(judged.mixture, shuffled.mixture, atol=1e-12)
    values = brier_score(judged.mixture, golds)
    assert (values >= 0).all() and (values <= 2 + 1e-12).all()


@given(documents())
def test_one_gold_is_the_old_definition(drawn_documents):
    scores, _, golds = drawn_documents
    index = golds.argmax(axis=1)
    one = np.eye(golds.shape[1], dtype=bool)[index]
    p = Predictions.from_scores(scores, one).mixture
    assert np.allclose(brier_score(p, one), np.square(p - one).sum(axis=1), atol=1e-12)
    assert np.allclose(brier_score(p, index), brier_score(p, one), atol=0)
    chosen = np.take_along_axis(p, index[:, None], axis=1)[:, 0]
    assert np.allclose(np.exp(-negative_loglikelihood(p, one)), chosen, atol=1e-12)
