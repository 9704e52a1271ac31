"""Tasks of generated texts: lm-eval's table, its samples, ``analyse`` and the report, computed a second time."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import yaml
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_generation import asked, prompts, texts_of
from test_model import lora

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.analysis.answers import AnswerReader, evaluate_answers
from lm_eval_lora_ensemble.analysis.evaluation import evaluate
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.generation import TextGenerator
from lm_eval_lora_ensemble.metrics.answers import ANSWER_SCORES, prediction_rejection_ratio
from lm_eval_lora_ensemble.metrics.bootstrap import ResamplingPlan
from lm_eval_lora_ensemble.metrics.ranking import Ranking

IN_TABLE = [name for name, score in ANSWER_SCORES.items() if score.in_table]
NEW_TOKENS = 6


def common_pair(texts: list[str]) -> str:
    """Return the two letters that about half of the texts hold: a stop string that ends some and not others."""
    found = Counter(pair for text in texts for pair in {*re.findall("(?=([a-z]{2}))", text)})
    return min(found, key=lambda pair: (abs(found[pair] - len(texts) / 2), pair))


def write_task(folder: Path, name: str, rows: list[dict], **config: object) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **config,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))


@pytest.fixture(scope="module")
def task_folder(ensemble, tmp_path_factory) -> Path:
    """Questions of which the ensemble answers every other one as the key has it; one question occurs twice."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = prompts(14)
    model = lora(ensemble)
    stop = common_pair(texts_of(model, asked(questions, until=[], max_gen_toks=NEW_TOKENS)))
    kwargs = {"until": [stop], "max_gen_toks": NEW_TOKENS}
    said = texts_of(model, asked(questions, **kwargs))
    rows = [
        {"question": q, "answer": t if i % 2 else "nothing"}
        for i, (q, t) in enumerate(zip(questions, said, strict=True))
    ]
    first = {"function": "take_first"}
    filters = [
        {"name": "whole", "filter": [first]},
        {"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\S+)"}, first]},
    ]
    write_task(folder, "answers", [*rows, rows[1]], filter_list=filters, generation_kwargs=kwargs)
    write_task(folder, "others", rows[:5], filter_list=filters, generation_kwargs=kwargs)
    write_task(
        folder,
        "drawn",
        rows[:4],
        repeats=3,
        generation_kwargs={**kwargs, "do_sample": True, "temperature": 1.0},
    )
    group = {
        "group": "both",
        "task": ["answers", "others"],
        "aggregate_metric_list": [{"metric": "exact_match"}],
    }
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


def evaluated(model, tasks: list[str], folder: Path, **options: object) -> dict:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=20, **options)


@pytest.fixture(scope="module")
def ours(ensemble, task_folder) -> dict:
    return evaluated(lora(ensemble, batch_size=4), ["both", "drawn"], task_folder)


def recomputed(blocks: list[dict]) -> dict[str, float]:
    """A document's scores from the tokens it logged."""
    found: dict[str, list[float]] = {name: [] for name in IN_TABLE}
    for block in blocks:
        s, length = np.array(block["members"]), len(block["tokens"]["id"])
        joint = scipy.special.logsumexp(s) - math.log(len(s))
        found["mean_token_entropy"].append(float(np.mean(block["tokens"]["total"])))
        found["mean_token_mutual_information"].append(float(np.mean(block["tokens"]["mutual_information"])))
        found["reverse_mutual_information"].append((joint - s.mean()) / length)
        found["answer_nll"].append(-joint)
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("task", ["answers", "others", "drawn"])
def test_the_table_follows_from_the_samples_under_every_filter(ours, task):
    samples = ours["samples"][task]
    filters = {sample["filter"] for sample in samples}
    assert len(filters) == (1 if task == "drawn" else 2)
    for filter_key in filters:
        of_filter = [s for s in samples if s["filter"] == filter_key]
        values = [recomputed(s["generation"]) for s in of_filter]
        for name in IN_TABLE:
            shown = ours["results"][task][f"{name},{filter_key}"]
            assert shown == pytest.approx(np.mean([v[name] for v in values]), abs=1e-5)
            assert shown > 1e-3
            assert f"{name}_stderr,{filter_key}" in ours["results"][task]
        assert ours["results"][task][f"members,{filter_key}"] == 3
        assert "generation" not in {key.partition(",")[0] for key in ours["results"][task]}


def test_a_block_says_what_lm_eval_was_given(ours):
    for task, repeats in (("answers", 1), ("drawn", 3)):
        for sample in ours["samples"][task]:
            assert [block["text"] for block in sample["generation"]] == list(sample["resps"][0])
            assert len(sample["generation"]) == repeats
            for block in sample["generation"]:
                tokens = block["tokens"]
                assert {len(values) for values in tokens.values()} == {len(tokens["id"])}
                np.testing.assert_allclose(sum(tokens["log_prob"]), -block["answer_nll"], atol=2e-5)
                assert np.all(np.array(tokens["mutual_information"]) >= 0)
                assert all(1 - 1e-6 <= n <= 3 + 1e-6 for n in tokens["effective_members"])
                assert json.loads(json.dumps(block, allow_nan=False)) == block
    assert len({tuple(s["resps"][0]) for s in ours["samples"]["drawn"]}) > 1


def test_statistics_stop_where_the_text_does(ours):
    blocks = [block for sample in ours["samples"]["answers"] for block in sample["generation"]]
    ends = {block["ended"] for block in blocks}
    assert {"stop_string", "length"} <= ends
    for block in blocks:
        pieces = block["tokens"]["text"]
        if "\ufffd" in "".join(pieces):  # part of a character
            continue
        assert "".join(pieces).startswith(block["text"])
        assert block["text"].startswith("".join(pieces[:-1]))  # the last token alone goes past the end
        assert (
            block["ended"] == "stop_string"
            or "".join(pieces) == block["text"]
            or block["ended"] == "end_token"
        )


def test_a_group_weighs_documents(ours):
    for filter_key in ("whole", "word"):
        sizes = {"answers": 15, "others": 5}
        for name in IN_TABLE:
            mean = sum(ours["results"][t][f"{name},{filter_key}"] * n for t, n in sizes.items()) / 20
            assert ours["groups"]["both"][f"{name},{filter_key}"] == pytest.approx(mean)


def test_other_models_and_switched_off_runs_are_left_alone(ensemble, llama, task_folder, ours):
    theirs = evaluated(HFLM(pretrained=str(llama), device="cpu"), ["others"], task_folder)
    off = evaluated(lora(ensemble, uncertainty_metrics=False), ["others"], task_folder)
    for run in (theirs, off):
        names = {key.partition(",")[0] for key in run["results"]["others"]}
        assert not names & {*ANSWER_SCORES, "members"}
        assert "generation" not in run["samples"]["others"][0]


def test_a_draw_is_the_requests_own(ensemble, task_folder, ours):
    """Another batch size, and other tasks beside it, change no text; another seed does."""
    alone = evaluated(lora(ensemble, batch_size=1), ["drawn"], task_folder)
    assert [s["resps"] for s in alone["samples"]["drawn"]] == [s["resps"] for s in ours["samples"]["drawn"]]
    other = evaluated(lora(ensemble, batch_size=1), ["drawn"], task_folder, torch_random_seed=7)
    assert [s["resps"] for s in other["samples"]["drawn"]] != [s["resps"] for s in ours["samples"]["drawn"]]


def test_hits_of_a_cache_carry_everything(ensemble, task_folder, tmp_path, monkeypatch):
    options = {"use_cache": str(tmp_path / "cache")}
    first = evaluated(lora(ensemble), ["both"], task_folder, **options)
    monkeypatch.setattr(TextGenerator, "generate", lambda *_, **__: pytest.fail("generated again"))
    second = evaluated(lora(ensemble), ["both"], task_folder, **options)
    for task in ("answers", "others"):
        assert first["results"][task] == second["results"][task]
        assert [s["generation"] for s in second["samples"][task]] == [
            s["generation"] for s in first["samples"][task]
        ]


# ------------------------------------------------------------------------------------------- saved runs


@pytest.fixture(scope="module")
def saved(ours, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.model_name_sanitized = "run"
    results = {key: value for key, value in ours.items() if key != "samples"}
    tracker.save_results_aggregated(results=results, samples=ours["samples"])
    for task in ours["configs"]:
        tracker.save_results_samples(task_name=task, samples=ours["samples"][task])
    return folder


def test_errors_are_ranked_as_others_rank_them(saved, ours):
    (run,) = load_runs(saved)
    result = evaluate(run, ood=["others"], settings=Settings(resamples=50))
    assert set(result.answers) == {"answers", "others", "drawn"}
    for filter_key in ("whole", "word"):
        of_filter = [s for s in ours["samples"]["answers"] if s["filter"] == filter_key]
        wrong = np.array([s["exact_match"] == 0 for s in of_filter])
        found = result.answers["answers"][filter_key]
        assert (found.documents, found.members, found.judged_by) == (15, 3, "exact_match")
        assert found.accuracy is not None
        assert found.accuracy.value == pytest.approx(1 - wrong.mean())
        for name, told in found.errors.items():
            score = np.array([s["generation"][0][name] for s in of_filter])
            if 0 < wrong.sum() < len(wrong):
                assert told.auroc.value == pytest.approx(sklearn.metrics.roc_auc_score(wrong, score))
                assert told.prr.value == pytest.approx(prr(score, wrong))
            assert told.risk_coverage[-1] == (1.0, pytest.approx(wrong.mean()))
        p = np.exp([-s["generation"][0]["answer_nll"] for s in of_filter])
        assert found.confidence is not None
        assert found.confidence.value == pytest.approx(p.mean())
    between = result.answer_detection["answers"]["others"]["answer_nll"]
    inside, outside = (
        [s["generation"][0]["answer_nll"] for s in ours["samples"][t] if s["filter"] == "whole"]
        for t in ("answers", "others")
    )
    is_out = [0] * len(inside) + [1] * len(outside)
    assert between.auroc.value == pytest.approx(sklearn.metrics.roc_auc_score(is_out, inside + outside))
    json.dumps(result.to_dict(), allow_nan=False)


def prr(score, wrong) -> float:
    """Cumulative error rates of the score's ranking and of the best one; two equals in both orders."""

    def area(order) -> float:
        return float(np.mean(np.cumsum(wrong[order]) / np.arange(1, len(wrong) + 1)))

    rate = wrong.mean()
    assert len(set(score)) >= len(score) - 1
    best = area(np.argsort(wrong, kind="stable"))
    both = [area(np.lexsort((tie, score))) for tie in (np.arange(len(score)), -np.arange(len(score)))]
    return float((rate - np.mean(both)) / (rate - best))


def test_a_perfect_ranking_has_ratio_one_and_its_reverse_is_below_zero():
    wrong = np.array([False, False, True, False, True])
    assert prediction_rejection_ratio(Ranking(wrong.astype(float), wrong).runs())[0] == pytest.approx(1)
    assert prediction_rejection_ratio(Ranking(-wrong.astype(float), wrong).runs())[0] < 0
    assert prediction_rejection_ratio(Ranking(np.zeros(5), wrong).runs())[0] == pytest.approx(0)
    assert np.isnan(prediction_rejection_ratio(Ranking([1.0, 2.0], [0, 0]).runs())[0])


def test_the_commands_read_it(saved, tmp_path, capsys):
    assert (
        cli.main(
            [
                "analyse",
                str(saved),
                "--ood",
                "others",
                "--resamples",
                "20",
                "--json",
                str(tmp_path / "a.json"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "answers, word: 15 generated answers, right or wrong by exact_match" in printed
    assert "Out-of-domain detection, in-domain answers" in printed
    assert (
        json.loads((tmp_path / "a.json").read_text())["runs"][0]["answers"]["answers"]["word"]["documents"]
        == 15
    )
    pytest.importorskip("matplotlib")
    output = tmp_path / "report"
    assert (
        cli.main(["report", str(saved), "--ood", "others", "--resamples", "20", "--output", str(output)]) == 0
    )
    page = (output / "report.html").read_text()
    assert "How sure it is of generated answers" in page
    assert "answers, word" in page
    assert (output / "figures" / "answers-0-answers.svg").is_file()
    assert "Generated answers" in (output / "report.md").read_text()


def test_files_that_were_put_together_are_refused(ours):
    sample = ours["samples"]["others"][0]
    reader = AnswerReader(Path("samples.jsonl"))
    reader.add(sample, 1)
    with pytest.raises(EnsembleError, match="line 2: document 0 occurs twice"):
        reader.add(sample, 2)
    other = {**sample, "doc_id": 1, "generation": [{**sample["generation"][0], "members": [-1.0]}]}
    with pytest.raises(EnsembleError, match="samples of two ensembles were mixed"):
        reader.add(other, 3)
    with pytest.raises(EnsembleError, match="not a sample of generated texts"):
        AnswerReader(Path("samples.jsonl")).add({**sample, "generation": [{"tokens": {}}]}, 1)


def test_an_answer_without_a_score_counts_in_accuracy(ours):
    """A thought without an answer after it: lm-eval calls it wrong, and there is nothing to rank it by."""
    sample = next(s for s in ours["samples"]["answers"] if s["filter"] == "word")
    empty = {**sample["generation"][0], **dict.fromkeys(ANSWER_SCORES)}
    reader = AnswerReader(Path("samples.jsonl"))
    for d in range(50):
        block = empty if d < 20 else sample["generation"][0]
        reader.add({**sample, "doc_id": d, "generation": [block], "exact_match": float(d >= 23)}, d + 1)
    scores = reader.scores()
    assert (scores.n_documents, scores.left_out) == (30, 20)
    found = evaluate_answers(scores, ResamplingPlan(30, 50))["word"]
    assert found.accuracy.value == pytest.approx(27 / 50)
    assert found.accuracy.quoted[0] < 27 / 50 < found.accuracy.quoted[1] < 0.8


def test_a_metric_of_which_less_is_better_says_not_what_is_right(ours):
    sample = next(s for s in ours["samples"]["answers"] if s["filter"] == "word")
    judged = {**{k: v for k, v in sample.items() if k != "exact_match"}, "metrics": ["toxic"], "toxic": 0.0}
    for lower_is_better in ((), ("toxic",)):
        reader = AnswerReader(Path("samples.jsonl"), lower_is_better)
        reader.add(judged, 1)
        assert reader.scores().judged_by == ({} if lower_is_better else {"word": "toxic"})
