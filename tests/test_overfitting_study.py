"""The study of docs/study.md: what it would run, and that its tables and verdicts say what its results say."""

from __future__ import annotations

import argparse
import itertools
import json
import re

import numpy as np
import pytest
from conftest import PROJECT
from lm_eval.tasks import TaskManager
from report_fixtures import write_run
from scipy import special, stats
from sklearn.metrics import roc_auc_score
from study_modules import study_modules, write_records

from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train.recipe import Recipe

SETTINGS = Settings(resamples=200)


@pytest.fixture(scope="module")
def study():
    return study_modules("overfitting_study", "claims", "figure", "page", "plan", "results")


def test_the_page_has_every_table_and_nothing_made_by_hand(study):
    page = study.page.PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- overfitting: (\w+) -->", page)) == set(study.page.BLOCKS)
    assert "A trial" not in page
    assert study.page.filled(page, None).count("*Not run yet.*") == len(study.page.BLOCKS)


def test_a_replicate_of_both_penalties_comes_first_and_the_prior_is_evaluated_once(study):
    every = study.plan.steps(study.plan.Sizes())
    names = [step.name for step in every]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("results/prior/") for name in names) == len(
        study.plan.Sizes().documents(study.plan.PRIOR)
    )
    for step in every:
        read = set(re.findall(r"\{output\}/(train/[\w/]+)", " ".join(step.command))) - {step.name}
        assert read == set(step.needs)
        assert all(names.index(name) < names.index(step.name) for name in step.needs)
    first = [name for name in names if "seed_0" in name or "prior" in name]
    assert names[: len(first)] == first
    assert {step.command for step in study.plan.steps(study.plan.Sizes(seeds=1))} <= {
        s.command for s in every
    }


def test_what_it_trains_and_evaluates_is_what_recipes_and_tasks_take(study):
    every = study.plan.steps(study.plan.Sizes())
    seeds = set()
    for step in every:
        if step.kind == "train":
            recipe = Recipe.load(
                step.command[3], [word.replace("{output}", "study") for word in step.command[4:]]
            )
            assert (recipe.epochs, recipe.max_steps, recipe.members) == (study.plan.EPOCHS[-1], None, 5)
            seeds.add((recipe.lora_l2, recipe.seed))
    assert len(seeds) == 6 and {seed for _, seed in seeds} == {0, 1000, 2000}
    own = PROJECT / "docs" / "study" / "overfitting_study" / "tasks"
    known = TaskManager(include_path=str(own)).all_tasks
    asked = {step.command[step.command.index("--tasks") + 1] for step in every if "--tasks" in step.command}
    assert study.plan.VALIDATION in asked and asked <= set(known)
    (shown,) = {step.command[-1] for step in every if study.plan.VALIDATION in step.command}
    assert shown.replace("{study}", str(PROJECT / "docs" / "study")) == str(own)


def test_sizes_that_are_none_are_one_line(study):
    for share, seeds in ((0.0, 1), (1.5, 1), (0.5, 0)):
        with pytest.raises(EnsembleError, match=r"--share|at least one seed"):
            study.plan.Sizes.of_share(seeds, share, "float32")
    assert not study.plan.Sizes.of_share(3, 1.0, "float32").is_trial
    trial = study.plan.Sizes.of_share(1, 0.5, "float32")
    script = _script(study, trial)
    with pytest.raises(EnsembleError, match=r"study\.md has results of the default sizes"):
        study.command.main(script, argparse.Namespace(output=study.page.PAGE, publish=True))


def _script(study, sizes):
    whole = study.plan.Sizes()
    return study.command.Script(
        study.page.PAGE, lambda _: sizes, lambda _: whole, study.plan.steps, study.results.Study, None, None
    )


def test_nothing_is_published_of_nothing(study, tmp_path):
    chosen = argparse.Namespace(output=tmp_path, publish=True, plan=False, tables=True, jobs=1)
    with pytest.raises(EnsembleError, match="nothing is done in"):
        study.command.main(_script(study, study.plan.Sizes()), chosen)


def test_a_file_in_the_folders_place_is_named(study, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnsembleError, match="is a file; name a folder"):
        study.command.main(
            _script(study, study.plan.Sizes()),
            argparse.Namespace(output=tmp_path / "file", publish=False, plan=True),
        )


@pytest.mark.parametrize(
    ("side", "limits", "verdict"),
    [
        ("lower", (-0.05, -0.01), "appears"),
        ("lower", (0.02, 0.05), "does not"),
        ("lower", (0.001, 0.005), "does not"),
        ("lower", (-0.005, 0.005), "does not"),
        ("lower", (-0.05, 0.005), "undecided"),
        ("higher", (0.01, 0.02), "appears"),
        ("higher", (-0.02, 0.05), "undecided"),
        ("same", (-0.005, 0.004), "appears"),
        ("same", (0.001, 0.009), "appears"),
        ("same", (0.02, 0.05), "does not"),
        ("same", (-0.05, -0.02), "does not"),
        ("same", (0.005, 0.02), "undecided"),
        ("same", (-0.02, -0.005), "undecided"),
        ("same", (-0.02, 0.005), "undecided"),
        ("same", (float("nan"), float("nan")), "undecided"),
    ],
)
def test_a_verdict_follows_from_the_interval_and_from_what_matters(study, side, limits, verdict):
    claim = study.claims.Claim("topic", "words", None, "nll", side, 0.01, 100)
    assert claim.verdict(study.values.Value(np.mean(limits), *limits)) == verdict


def test_a_verdict_needs_the_seeds_to_agree_too(study):
    claim = study.claims.Claim("topic", "words", None, "nll", "lower", 0.01, 100)
    over_documents = study.values.Value(-0.03, -0.05, -0.01)
    assert claim.verdict(over_documents) == "appears"
    assert claim.verdict(study.values.Value(-0.03, -0.05, -0.01, 0.02, (-0.08, 0.02))) == "undecided"


# ------------------------------------------------------------------------------------------- the tables


def _saved(study, output, *, seeds=3, share=0.4, keep=lambda _: True):
    """Write results and records as the steps would have, and return the study."""
    sizes = study.plan.Sizes.of_share(seeds, share, "float32")
    records = {}
    for number, step in enumerate(study.plan.steps(sizes)):
        if not keep(step.name):
            continue
        records[step.name] = study.running.Record(step.command, 1.0, 1.0, False, {"processor": "some"})
        if step.name.startswith("results/"):
            _write(output / step.name, step.name, number)
    return study.results.Study(sizes, output, records, SETTINGS)


def _write(folder, name, number):
    place, _, task = name.removeprefix("results/").rpartition("/")
    task, _, documents = task.rpartition("_")
    epoch = 0 if place == "prior" else int(place[-1])
    ensemble = {"fingerprint": place, "base_model": "base", "epoch": epoch}
    config = {"model": "lora-ensemble", "model_args": {"adapters": place}, "lora_ensemble": ensemble}
    # a task's questions are the same however many are asked
    write_run(folder, {task: 400}, members=1 if epoch == 0 else 5, seed=number, config=config, sharpness=1.5)
    (file,) = folder.glob("samples_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()[: int(documents)]]
    if task == "commonsense_qa":
        for line in lines:
            for choice, letter in enumerate("ABCD"):
                line["arguments"][f"gen_args_{choice}"]["arg_1"] = f" {letter}"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _summed(folder):
    """Members' probabilities (N, D, C) from summed scores, and the gold choices, from the file alone."""
    (file,) = folder.glob("samples_*.jsonl")
    lines = list(map(json.loads, file.read_text().splitlines()))
    scores = np.array([line["members"] for line in lines]).transpose(1, 0, 2)
    return special.softmax(scores, axis=2), np.array([int(line["target"]) for line in lines])


def _nll(p, gold):
    return -np.log(p[..., np.arange(len(gold)), gold]).mean(-1)


def _row(text, words):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {words} |")]
    return line.strip("| ").split(" | ")


def test_claims_say_what_the_files_say(study, tmp_path):
    of = _saved(study, tmp_path)
    text = study.page.claimed(of)
    gains, fewer, found = [], [], []
    for seed in range(3):
        place = tmp_path / f"results/lambda_0/seed_{seed}/epoch_6"
        p, gold = _summed(place / "arc_easy_400")
        gains.append(_nll(p.mean(0), gold) - _nll(p, gold).mean())
        pairs = [_nll(p[list(pair)].mean(0), gold) for pair in itertools.combinations(range(5), 2)]
        fewer.append(_nll(p.mean(0), gold) - np.mean(pairs))
        q, _ = _summed(place / "hellaswag_200")
        entropies = [stats.entropy(part.mean(0), axis=1) for part in (p, q)]
        outside = np.repeat([0, 1], [p.shape[1], q.shape[1]])
        found.append(roc_auc_score(outside, np.concatenate(entropies)) - 0.5)
    for words, expected in (
        ("arc_easy: the ensemble's nll is lower than a member's", gains),
        ("arc_easy: 2 members have the nll of 5, within .005", fewer),
        ("hellaswag: entropy is higher than on arc_easy (AUROC − ½)", found),
    ):
        _, verdict, _, raw, oracle, _, documents = _row(text, words)
        shown = f"{np.mean(expected):.3f}".replace("-", "−")
        assert raw.startswith(f"{shown} [") and raw.endswith(f"± {np.std(expected, ddof=1):.3f}")
        assert verdict.strip("*") in ("appears", "does not", "undecided") and "[" in oracle
        assert documents.endswith("× 3")
    assert "**appears**" in _row(text, "arc_easy: the ensemble's nll is lower than a member's")


def test_retention_is_of_the_priors_answers_to_the_same_documents(study, tmp_path):
    of = _saved(study, tmp_path, seeds=1)
    before, gold = _summed(tmp_path / "results/prior/arc_easy_400")
    after, same = _summed(tmp_path / "results/lambda_1/seed_0/epoch_3/arc_easy_120")
    assert (gold[:120] == same).all()
    knew, knows = before[0, :120].argmax(1) == same, after.mean(0).argmax(1) == same
    measure = study.results.Kept(study.results.by_epoch("1", 3, "arc_easy", of.sizes))
    judged = of.judge(measure, study.results.RAW_SUMS)
    assert judged.value("kept").value == pytest.approx((knew & knows).sum() / knew.sum())
    assert "arc_easy, λ = 1, epoch 3" in study.page.retained(of)


def test_every_table_and_the_figure_are_made_of_whole_results(study, tmp_path):
    of = _saved(study, tmp_path, seeds=1)
    page = study.page.filled(study.page.PAGE.read_text(encoding="utf-8"), of)
    assert "Not run yet" not in page and "A trial" in page and "nan" not in page
    assert len(re.findall(r"^\| M = \d ", page, re.MULTILINE)) == 5
    assert page.count("\n| λ = 0, epoch") == 6, "three epochs, one member and five"
    *_, letters = _row(page, "commonsense_qa, λ = 0")
    *_, texts = _row(page, "mmlu_sociology_continuation, λ = 0")
    assert letters == "–" and "[" in texts, (
        "mutual information of letters does not compare with that of texts"
    )
    study.figure.draw(of, tmp_path)
    assert (tmp_path / study.figure.NAME).read_text().startswith("<?xml")


def test_what_is_not_done_is_left_out_and_said(study, tmp_path):
    of = _saved(study, tmp_path, seeds=2, keep=lambda name: "seed_1" not in name and "lambda_1" not in name)
    said = study.page.what_was_run(of)
    assert "λ = 0: 1 of 2, λ = 1: 0 of 2" in said and "Left: about" in said
    text = study.page.claimed(of)
    assert "λ = 1 lowers" not in text and "× 1 |" in text and "× 2 |" not in text
    assert "arc_easy, λ = 1" not in study.page.retained(of)
    nothing = study.results.Study(of.sizes, tmp_path, {}, SETTINGS)
    page = study.page.PAGE.read_text(encoding="utf-8")
    assert study.page.filled(page, nothing) == study.page.filled(page, None)
    study.figure.draw(nothing, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_archive_of_a_study_gives_its_tables_wherever_the_prior_was_evaluated(study, tmp_path):
    made, again = tmp_path / "study", tmp_path / "unpacked"
    of = _saved(study, made, seeds=2)
    for number, file in enumerate(sorted((made / "results" / "prior").rglob("results_*.json"))):
        results = json.loads(file.read_text())
        results["config"]["model_args"]["adapters"] = f"/moved/{number}"
        file.write_text(json.dumps(results))
    write_records(made, of.records)
    study.archive.pack(made, of.records, tmp_path / "study.tar.xz")
    study.archive.unpack(tmp_path / "study.tar.xz", again)
    read = study.running.read_records(study.plan.steps(of.sizes), again)
    page = study.page.PAGE.read_text(encoding="utf-8")
    unpacked, first = (
        study.page.filled(page, one) for one in (study.results.Study(of.sizes, again, read, SETTINGS), of)
    )
    # the archive's scores are rounded
    words, numbers = re.compile(r"[−-]?\d+\.\d{3}"), re.compile(r"(\d+\.\d{3})")
    assert words.sub("", unpacked) == words.sub("", first)
    assert np.allclose(*(np.array(numbers.findall(t), float) for t in (unpacked, first)), rtol=0, atol=0.0011)
    assert "± 0.000" not in next(
        line for line in study.page.epochs(of).splitlines() if line.startswith("| prior")
    )


def test_other_documents_at_another_epoch_are_refused(study, tmp_path):
    of = _saved(study, tmp_path, seeds=1)
    (file,) = (tmp_path / "results/lambda_0/seed_0/epoch_3/arc_easy_120").glob("samples_*")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[3]["doc_hash"] = "f" * 64
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(EnsembleError, match="needs the same documents: number 3"):
        study.page.epochs(of)


def test_an_epoch_half_evaluated_gives_what_it_has(study, tmp_path):
    of = _saved(study, tmp_path, seeds=1, keep=lambda name: "epoch_6/hellaswag" not in name)
    text = study.page.claimed(of)
    assert "arc_easy: the ensemble's nll" in text and "λ = 1 lowers" in text
    assert "λ = 0: 0 of 1" in study.page.what_was_run(of), "no ensemble is evaluated whole"
    assert "| hellaswag: the ensemble's nll" not in text and "| hellaswag: entropy" not in text
    assert "hellaswag, λ" not in study.page.detected(of) and "arc_challenge, λ = 0" in study.page.detected(of)


def test_a_file_that_cannot_be_trusted_is_no_missing_result(study, tmp_path):
    of = _saved(study, tmp_path, seeds=1)
    (file,) = (tmp_path / "results/lambda_0/seed_0/epoch_6/arc_easy_400").glob("samples_*.jsonl")
    file.write_text("{")
    with pytest.raises(EnsembleError, match="samples_arc_easy"):
        study.page.claimed(of)
