"""Reading lm-eval's files: what it writes itself, what this backend adds, and what cannot be trusted."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lm_eval_lora_ensemble.analysis.run import merge_runs
from lm_eval_lora_ensemble.analysis.runs import load_runs, load_samples
from lm_eval_lora_ensemble.analysis.samples import iter_samples
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.choices import choice_probabilities, with_other_class

DATE = "2026-01-02T03-04-05.678901"


def sample(doc_id, members, gold, texts="ABCD", /, **changes):
    """One line as EvaluationTracker.save_results_samples writes it."""
    members = np.asarray(members, dtype=float)
    ensemble = np.log(np.exp(members).mean(0))
    line = {
        "doc_id": doc_id,
        "doc": {"question": f"Q{doc_id}"},
        "target": str(gold),
        "arguments": {
            f"gen_args_{i}": {"arg_0": f"Q{doc_id}", "arg_1": f" {t}"}
            for i, t in zip(range(members.shape[1]), texts, strict=False)
        },
        "resps": [[[str(value), "False"]] for value in ensemble],
        "filtered_resps": [[str(value), "False"] for value in ensemble],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": f"{doc_id:064x}",
        "prompt_hash": "",
        "target_hash": "",
        "members": members.tolist(),
    }
    if isinstance(gold, int):
        line["acc"] = float(np.argmax(ensemble) == gold)
    line.update(changes)
    return {key: value for key, value in line.items() if value is not None}


def write(folder, task, lines, date=DATE):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"samples_{task}_{date}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def results(folder, date=DATE, **content):
    path = folder / f"results_{date}.json"
    path.write_text(json.dumps({"results": {}, "config": {"model": "hf"}, **content}))
    return path


@pytest.fixture
def scores():
    return np.random.default_rng(0).normal(size=(6, 3, 4)) - 5


def test_member_scores_become_predictions(tmp_path, scores):
    path = write(tmp_path, "arc_easy", [sample(d, s, d % 4) for d, s in enumerate(scores)])
    run = load_samples(path)
    predictions = run.tasks["arc_easy"]
    assert np.allclose(predictions.probabilities, choice_probabilities(scores.transpose(1, 0, 2)))
    assert predictions.is_gold.argmax(1).tolist() == [0, 1, 2, 3, 0, 1]
    assert set(predictions.subjects) == {"arc_easy"}


def test_a_plain_models_run_is_an_ensemble_of_one(tmp_path, scores):
    lines = [sample(d, s[:1], 1, members=None) for d, s in enumerate(scores)]
    predictions = load_samples(write(tmp_path, "t", lines)).tasks["t"]
    assert predictions.n_members == 1
    assert np.allclose(predictions.mixture, choice_probabilities(scores[:, 0]))


def test_files_of_earlier_and_later_releases_are_read(tmp_path, scores):
    """Pairs of numbers instead of strings, no hashes, no filter, a string of arguments, keys nobody knows."""
    gone = dict.fromkeys(("doc_hash", "prompt_hash", "target_hash", "filter", "metrics", "members"))
    lines = [
        sample(d, s[:1], 1, filtered_resps=[[v, False] for v in s[0].tolist()], novelty={"x": 1}, **gone)
        for d, s in enumerate(scores)
    ]
    write(tmp_path, "t", lines)
    config = {"model": "hf", "model_args": "pretrained=some/model,dtype=float32"}
    results(tmp_path, config=config, group_subtasks=None, from_the_future=[1])
    run = load_samples(tmp_path)
    assert np.allclose(run.tasks["t"].mixture, choice_probabilities(scores[:, 0]))
    assert run.series == "" and run.epoch is None and run.seconds is None
    assert run.arguments == {"pretrained": "some/model", "dtype": "float32"}


def test_documents_of_several_ranks_are_put_in_order(tmp_path, scores):
    order = [0, 2, 4, 1, 3, 5]
    path = write(tmp_path, "t", [sample(d, scores[d], d % 4) for d in order])
    assert load_samples(path).tasks["t"].is_gold.argmax(1).tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("folder", "read"),
    [
        (".__model", True),
        (".unfinished/model", False),
        (".finished/model", False),
        (".in_progress/epoch_01", False),
    ],
)
def test_folders_of_killed_runs_are_not_read_and_those_of_relative_models_are(tmp_path, scores, folder, read):
    """lm-eval calls the folder of ``pretrained=./model`` ``.__model``."""
    (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / folder, "t", [sample(d, s, 0) for d, s in enumerate(scores)])
    if read:
        assert set(load_samples(tmp_path).tasks) == {"t"}
    else:
        with pytest.raises(EnsembleError, match="has no samples"):
            load_samples(tmp_path)


def test_ragged_documents_are_padded(tmp_path, scores):
    lines = [sample(d, s[:, : 3 + d % 2], 2) for d, s in enumerate(scores)]
    predictions = load_samples(write(tmp_path, "t", lines)).tasks["t"]
    assert predictions.counts.tolist() == [3, 4] * 3
    assert (predictions.probabilities[:, 0, 3] == 0).all()


def test_gold_may_be_a_choices_text(tmp_path, scores):
    lines = [sample(d, s, "C") for d, s in enumerate(scores)]
    assert set(load_samples(write(tmp_path, "t", lines)).tasks["t"].is_gold.argmax(1)) == {2}


def test_gold_of_a_context_varying_task_comes_from_the_scores(tmp_path, scores):
    same = ["the rest"] * 4
    p = choice_probabilities(scores).mean(1)
    lines = [sample(d, s, "the rest", same, nll=-np.log(p[d, d % 4])) for d, s in enumerate(scores)]
    assert load_samples(write(tmp_path / "a", "w", lines)).tasks["w"].is_gold.argmax(1).tolist() == [
        0,
        1,
        2,
        3,
        0,
        1,
    ]
    best = scores[:, 0, :2].argmax(1)
    lines = [
        sample(d, s[:1, :2], "the rest", same, members=None, acc=float(best[d] == d % 2))
        for d, s in enumerate(scores)
    ]
    assert load_samples(write(tmp_path / "b", "w", lines)).tasks["w"].is_gold.argmax(1).tolist() == [
        0,
        1,
        0,
        1,
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": "-100"}, "neither an index nor one of the 4"),
        ({"target": "none of these"}, "neither an index nor one of the 4"),
        ({"acc": 0.5}, "acc is 0.5, neither right nor wrong"),
        ({"target": "0", "acc": 1.0}, "acc says otherwise"),
    ],
)
def test_unknown_gold_is_said_when_it_is_needed(tmp_path, changes, reason):
    members = [[-3.0, -1.0, -2.0, -2.0]]
    predictions = load_samples(write(tmp_path, "t", [sample(0, members, 1, **changes)])).tasks["t"]
    assert predictions.is_gold is None
    with pytest.raises(EnsembleError, match=reason):
        predictions.require_gold()


def test_a_list_of_targets_is_several_golds(tmp_path):
    members = [[-3.0, -1.0, -2.0, -2.0]]
    path = write(tmp_path, "t", [sample(0, members, 1, target="[0, 2]", acc=0.0)])
    predictions = load_samples(path).tasks["t"]
    assert predictions.is_gold.tolist() == [[True, False, True, False]]
    assert predictions.correct.tolist() == [False]


def test_the_class_other_is_recognised_by_its_nll(tmp_path, scores):
    p = with_other_class(scores).mean(1)
    lines = [sample(d, s, 1, nll=-np.log(p[d, 1])) for d, s in enumerate(scores)]
    predictions = load_samples(write(tmp_path, "paper", lines)).tasks["paper"]
    assert predictions.counts.tolist() == [5] * 6
    assert np.allclose(predictions.mixture, p)


def test_what_was_logged_is_read_and_not_guessed(tmp_path, scores):
    """A target that misleads, no nll to try "other" by, and documents of different widths."""
    lines = [
        sample(d, s[:, : 3 + d % 2], 0, golds=[2], other_class=True, acc=None) for d, s in enumerate(scores)
    ]
    found = load_samples(write(tmp_path, "t", lines)).tasks["t"]
    assert found.is_gold.argmax(1).tolist() == [2] * 6
    assert found.counts.tolist() == [4, 5] * 3
    for d, s in enumerate(scores):
        width = 3 + d % 2
        expected = with_other_class(s[:, :width]).mean(0)
        assert np.allclose(found.mixture[d, : width + 1], expected)
        assert (found.mixture[d, width + 1 :] == 0).all()


def test_an_nll_of_the_tasks_own_is_not_held_against_the_scores(tmp_path, scores):
    p = choice_probabilities(scores).mean(1)
    ours = [-np.log(p[d, 1]) for d in range(6)]
    lines = [
        sample(d, s, 1, golds=[1], other_class=False, nll=7.0, ensemble_nll=ours[d])
        for d, s in enumerate(scores)
    ]
    assert load_samples(write(tmp_path, "t", lines)).tasks["t"].is_gold.argmax(1).tolist() == [1] * 6


def test_unconditional_scores_of_acc_mutual_info_are_left_out(tmp_path):
    line = sample(0, [[-1.0, -2.0, -3.0, -4.0]], 0, members=None)
    line["arguments"] |= {f"gen_args_{i}": {"arg_0": "", "arg_1": "x"} for i in (2, 3)}
    assert load_samples(write(tmp_path, "t", [line])).tasks["t"].counts.tolist() == [2]


def test_groups_pool_their_tasks(tmp_path, scores):
    for task in ("a", "b", "c"):
        write(tmp_path, task, [sample(d, s, 1) for d, s in enumerate(scores)])
    results(
        tmp_path, group_subtasks={"all": ["ab", "c"], "ab": ["a", "b"], "c": [], "more": ["c", "missing"]}
    )
    run = load_samples(tmp_path)
    assert run.groups == {"all": ("a", "b", "c"), "ab": ("a", "b")}
    assert run.top_level() == ["all"]
    assert run.predictions("all").n_documents == 18
    assert "1 of its 2 tasks" in run.skipped["more"]
    with pytest.raises(EnsembleError, match=r"no samples of 'd'.*it has all, ab, a, b, c"):
        run.predictions("d")


def test_runs_are_told_apart_and_joined_only_if_of_one_model(tmp_path, scores):
    lines = [sample(d, s, 1) for d, s in enumerate(scores)]
    other = DATE.replace("03", "04", 1)
    write(tmp_path, "a", lines)
    write(tmp_path, "b", lines, other)
    with pytest.raises(EnsembleError, match="holds 2 runs"):
        load_samples(tmp_path)
    assert len(merge_runs(load_runs(tmp_path))) == 2  # nothing says whose they are
    for date in (DATE, other):
        results(tmp_path, date, config={"lora_ensemble": {"fingerprint": "f", "epoch": 1}})
    (merged,) = merge_runs(load_runs(tmp_path))
    assert list(merged.tasks) == ["a", "b"]
    results(tmp_path, other, config={"lora_ensemble": {"fingerprint": "g", "epoch": 1}})
    assert len(merge_runs(load_runs(tmp_path))) == 2
    assert load_samples(tmp_path / f"results_{other}.json").tasks.keys() == {"b"}


@pytest.mark.parametrize(
    ("given", "runs"),
    [
        ("pretrained=some/model,peft=mine,trust_remote_code=True", 1),  # the same as the other's mapping
        ("pretrained=some/model,peft=theirs,trust_remote_code=True", 2),
        (None, 2),  # a ready-made model: lm-eval keeps the base's name only
        ("", 2),
    ],
)
def test_runs_of_other_models_are_joined_if_their_arguments_say_one(tmp_path, scores, given, runs):
    lines = [sample(d, s[:1], 1) for d, s in enumerate(scores)]
    other = DATE.replace("03", "04", 1)
    mapping = {"pretrained": "some/model", "peft": "mine", "trust_remote_code": True}
    first = mapping if given else given
    for task, date, arguments in (("a", DATE, first), ("b", other, given)):
        write(tmp_path, task, lines, date)
        results(tmp_path, date, config={"model": "hf", "model_args": arguments})
    assert len(merge_runs(load_runs(tmp_path))) == runs


@pytest.mark.parametrize(
    ("logged", "by_text"),
    [("acc", True), ("acc_norm", True), ("acc", False), (None, None)],
)
def test_numbers_for_targets_are_places_or_texts_as_the_whole_file_allows(tmp_path, logged, by_text):
    """Choices 2, 3, 1 and 0: is "1" the second one, or the third?"""
    texts, lines = ["2", "3", "1", "0"], []
    draw = np.random.default_rng(0)
    for d in range(12):
        scores = draw.normal(size=(1, 4))
        said = d % 4
        gold = texts.index(str(said)) if by_text else said
        right = float(scores[0].argmax() == gold) if logged else None
        metrics = {"acc": None, **({logged: right} if logged else {})}
        lines.append(sample(d, scores, str(said), texts, members=None, **metrics))
    write(tmp_path, "sums", lines)
    predictions = load_samples(tmp_path).tasks["sums"]
    if by_text is None:
        assert predictions.is_gold is None
        assert "whether they are choices' places or their texts" in predictions.missing_gold
    else:
        golds = [texts.index(str(d % 4)) if by_text else d % 4 for d in range(12)]
        assert predictions.is_gold.argmax(1).tolist() == golds


def test_a_samples_file_that_lost_its_end_is_warned_of(tmp_path, scores, caplog):
    lines = [sample(d, s, 1) for d, s in enumerate(scores)]
    write(tmp_path, "t", lines[:4])
    results(tmp_path, **{"n-samples": {"t": {"original": 6, "effective": 6}}})
    load_samples(tmp_path)
    assert "has 4 documents, and the results file says that 6 were evaluated" in caplog.text
    caplog.clear()
    write(tmp_path, "t", lines)
    load_samples(tmp_path)
    assert not caplog.text


def test_a_run_without_samples_beside_others_is_named(tmp_path, scores, caplog):
    write(tmp_path, "t", [sample(d, s, 1) for d, s in enumerate(scores)])
    results(tmp_path)
    alone = results(tmp_path, DATE.replace("03", "04", 1))
    (tmp_path / ".unfinished").mkdir()
    results(tmp_path / ".unfinished")
    load_runs(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"left out: {alone} has no samples beside it; they take --log_samples"
    ]


def test_a_group_that_only_one_of_two_runs_has_whole_is_not_left_out_too(tmp_path, scores):
    lines = [sample(d, s, 1) for d, s in enumerate(scores)]
    other = DATE.replace("03", "04", 1)
    write(tmp_path, "a", lines)
    for task in ("b", "c"):
        write(tmp_path, task, lines, other)
    config = {"lora_ensemble": {"fingerprint": "f", "epoch": None}}
    results(tmp_path, config=config, group_subtasks={"g": ["b", "c"], "b": [], "c": []})
    results(tmp_path, other, config=config, group_subtasks={"g": ["b", "c"], "b": [], "c": []})
    (merged,) = merge_runs(load_runs(tmp_path))
    assert "g" in merged.groups and "g" not in merged.skipped


def test_runs_with_other_temperatures_are_not_joined(tmp_path, scores):
    lines = [sample(d, s, 1) for d, s in enumerate(scores)]
    other = DATE.replace("03", "04", 1)
    write(tmp_path, "a", lines)
    write(tmp_path, "b", lines, other)

    def known(date, calibration):
        ensemble = {"fingerprint": "f", "epoch": None, "calibration": calibration}
        results(tmp_path, date, config={"lora_ensemble": ensemble})

    known(DATE, {"scores": 1})
    for calibration, runs in (({"scores": 1}, 1), (None, 1), ({"scores": 2}, 2)):
        known(other, calibration)
        assert len(merge_runs(load_runs(tmp_path))) == runs


def test_a_tasks_own_scoring_makes_its_target_no_right_answer(tmp_path, scores):
    lines = [sample(d, s, 0, members=None, acc=None) for d, s in enumerate(scores)]
    write(tmp_path, "pairs", lines)
    results(tmp_path)
    assert load_samples(tmp_path).tasks["pairs"].is_gold is not None
    results(tmp_path, configs={"pairs": {"process_results": "def process_results(…"}})
    predictions = load_samples(tmp_path).tasks["pairs"]
    with pytest.raises(EnsembleError, match="a rule of its own"):
        predictions.require_gold()


def test_a_run_without_anything_to_analyse_does_not_hide_the_others(tmp_path, scores, caplog):
    write(tmp_path, "a", [sample(0, scores[0], 1)])
    other = DATE.replace("03", "04", 1)
    write(tmp_path, "gsm8k", [sample(0, scores[0], 1, members=None, filtered_resps=["42"])], other)
    (run,) = load_runs(tmp_path)
    assert list(run.tasks) == ["a"]
    assert f"{other}: no task can be analysed: gsm8k: not a multiple-choice" in caplog.text
    with pytest.raises(EnsembleError, match="gsm8k"):
        load_runs(tmp_path / f"samples_gsm8k_{other}.jsonl")


def test_generation_tasks_are_skipped_with_a_reason(tmp_path, scores):
    write(tmp_path, "a", [sample(0, scores[0], 1)])
    write(tmp_path, "gsm8k", [sample(0, scores[0], 1, members=None, filtered_resps=["42"])])
    assert "not a multiple-choice task" in load_samples(tmp_path).skipped["gsm8k"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no sample"),
        ([sample(0, [[0, 0]], 0), sample(0, [[0, 0]], 0)], "line 2: document 0 occurs twice"),
        ([sample(0, [[0, 0]], 0), sample(1, [[0, 0], [0, 0]], 0)], "line 2: 2 members, 1 before"),
        ([sample(0, [[0, 0]], 0, members=[[float("nan"), 0]])], "line 1: a loglikelihood is NaN"),
        ([sample(0, [[0, 0]], 0, members=[[-float("inf")] * 2])], "every choice has loglikelihood -inf"),
        ([sample(0, [[0, 0]], 0, members=[[0, 0], [0]])], "not a table of numbers"),
        ([sample(0, [[0, 0]], 0, members="x")], "not a table of numbers"),
        ([sample(0, [[-1, -2]], 0, nll=7.0)], "logged nll does not follow"),
        ([sample(0, [[0]], 0)], "1 choice"),
        ([sample(0, [[0, 0]], 0, golds=[2])], r"line 1: .*golds \[2\] are not among its 2 choices"),
        ([sample(0, [[0, 0]], 0, golds="x")], "line 1: not a sample of lm-eval"),
        (
            [sample(d, [[-1, -1]], 0, golds=[0], other_class=bool(d)) for d in range(2)],
            "line 2: other_class is True, False before",
        ),
        ([sample(0, [[-1, -2]], 0, golds=[0], other_class=False, nll=7.0)], "logged nll does not follow"),
        ([{"members": [[0, 0]]}], "not a sample of lm-eval"),
    ],
)
def test_files_that_cannot_be_trusted_are_refused(tmp_path, lines, message):
    path = write(tmp_path, "t", lines)
    with pytest.raises(EnsembleError, match=message):
        load_samples(path)


def test_other_bad_places(tmp_path, scores):
    with pytest.raises(EnsembleError, match="neither a folder"):
        load_runs(tmp_path / "nowhere")
    with pytest.raises(EnsembleError, match="--log_samples"):
        load_runs(tmp_path)
    path = write(tmp_path, "t", [sample(0, scores[0], 1)])
    with path.open("a") as stream:
        stream.write('{"doc_id": 1, "tar')
    with pytest.raises(EnsembleError, match="line 2: not JSON"):
        list(iter_samples(path))
    write(tmp_path, "t", [sample(0, scores[0], 1)])
    write(tmp_path, "u", [sample(0, scores[0, :2], 1)])
    with pytest.raises(EnsembleError, match="two ensembles were mixed"):
        load_runs(tmp_path)


def test_what_lm_eval_writes_itself_is_read(tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    data = tmp_path / "data.jsonl"
    docs = [
        {"q": f"question {d}", "options": ["one", "two", "three"][: 2 + d % 2], "gold": d % 2}
        for d in range(8)
    ]
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    found = simple_evaluate(model="dummy", tasks=[task], log_samples=True, bootstrap_iters=0)
    samples = found.pop("samples")
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    tracker.general_config_tracker.model_name_sanitized = "dummy"
    tracker.save_results_aggregated(results=found, samples=samples)
    tracker.save_results_samples(task_name="tiny", samples=samples["tiny"])

    run = load_samples(tmp_path / "out")
    predictions = run.tasks["tiny"]
    assert run.config["model"] == "dummy"
    assert predictions.is_gold.argmax(1).tolist() == [d % 2 for d in range(8)]
    assert predictions.counts.tolist() == [2 + d % 2 for d in range(8)]
    assert predictions.correct.mean() == pytest.approx(found["results"]["tiny"]["acc,none"])


def test_reading_and_evaluating_imports_neither_torch_nor_lm_eval():
    code = (
        "import sys; import lm_eval_lora_ensemble.analysis.command; "
        "print(sorted({'torch', 'lm_eval', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
