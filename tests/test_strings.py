"""Whole strings: LAMBADA's and wikitext's form, from the score's tokens to every number, computed a second time."""

from __future__ import annotations

import copy
import doctest
import json
import logging
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import DATA, random_adapters
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sqlitedict import SqliteDict
from string_tasks import write_string_tasks
from two_processes import in_two_processes

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.analysis.strings import StringReader, evaluate_strings
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness import strings
from lm_eval_lora_ensemble.harness.cache import OWNER_KEY, read_older_scores
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.metrics import strings as string_metrics
from lm_eval_lora_ensemble.metrics.bootstrap import ResamplingPlan
from lm_eval_lora_ensemble.metrics.strings import STRING_METRICS, linearised, quantities, ratio
from lm_eval_lora_ensemble.scoring.loglikelihood import EnsembleLoglikelihood

TASKS = ["last_word", "pages", "written"]
PER_TOKEN = {"nll_per_token", "member_nll_per_token", "reverse_mutual_information"}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    return write_string_tasks(tmp_path_factory.mktemp("tasks"))


def evaluate(model, tasks: list[str], folder: Path, **options: object) -> dict:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = {"bootstrap_iters": 20, **options}
    return simple_evaluate(model=model, tasks=tasks, task_manager=manager, **options)


@pytest.fixture(scope="module")
def ours(ensemble, task_folder) -> dict:
    return evaluate(LoraEnsembleLM(adapters=str(ensemble), device="cpu"), TASKS, task_folder)


@pytest.fixture(scope="module")
def alone(llama, ensemble, task_folder) -> list[dict]:
    """Each member by lm-eval's own model."""
    members = sorted(ensemble.iterdir())
    return [
        evaluate(HFLM(pretrained=str(llama), peft=str(member), device="cpu"), TASKS, task_folder)
        for member in members
    ]


# ---------------------------------------------------------------- a second computation, from the samples


def texts_of(task: str, sample: dict) -> tuple[str, str]:
    """What is scored, and what its words and bytes are counted in."""
    if task == "last_word":
        return " " + sample["doc"]["text"].split(" ")[-1], ""
    scored = sample["doc"]["page"].replace(" , ", ", ")
    return scored, sample["doc"]["page"] if task == "own_counts" else scored


def recomputed(task: str, samples: list[dict], tokenizer) -> dict[str, float]:
    """Every value of a task, from its samples' members and texts."""
    sums: dict[str, float] = dict.fromkeys(("mixture", "member", "token", "byte", "word"), 0.0)
    for sample in samples:
        scored, counted = texts_of(task, sample)
        scores = np.array(sample["members"])
        sums["mixture"] -= scipy.special.logsumexp(scores) - math.log(len(scores))
        sums["member"] -= scores.mean()
        context = sample["doc"]["text"].rpartition(" ")[0] if task == "last_word" else ""
        sums["token"] += len(tokenizer.encode(context + scored)) - len(tokenizer.encode(context))
        sums["byte"] += len(counted.encode())
        sums["word"] += len(counted.split())
    units = {"last_word": ("token",), "bytes_only": ("token", "byte")}.get(task, ("token", "byte", "word"))
    return {
        **{f"nll_per_{unit}": sums["mixture"] / sums[unit] for unit in units},
        **{f"member_nll_per_{unit}": sums["member"] / sums[unit] for unit in units},
        "reverse_mutual_information": (sums["member"] - sums["mixture"]) / sums["token"],
    }


@pytest.mark.parametrize("task", ["last_word", "pages", "own_counts", "bytes_only"])
def test_every_value_follows_from_the_samples(task, ours, ensemble, llama):
    tokenizer = HFLM(pretrained=str(llama), device="cpu").tokenizer
    row, samples = ours["results"][task], ours["samples"][task]
    expected = recomputed(task, samples, tokenizer)
    shown = {key.partition(",")[0] for key in row} & set(STRING_METRICS)
    assert shown == set(expected)
    for name, value in expected.items():
        assert row[f"{name},none"] == pytest.approx(value, abs=1e-9), name
    assert row["members,none"] == 3
    assert row["reverse_mutual_information,none"] > 1e-3
    assert ours["higher_is_better"][task]["nll_per_token"] is False
    assert "reverse_mutual_information" not in ours["higher_is_better"][task]


def test_the_mixtures_values_are_lm_evals_perplexities(ours):
    row = ours["results"]["pages"]
    assert math.exp(row["nll_per_word,none"]) == pytest.approx(row["word_perplexity,none"], rel=1e-9)
    assert math.exp(row["nll_per_byte,none"]) == pytest.approx(row["byte_perplexity,none"], rel=1e-9)
    assert row["nll_per_byte,none"] / math.log(2) == pytest.approx(row["bits_per_byte,none"], rel=1e-9)
    # word_perplexity divides by other texts' words there
    row = ours["results"]["own_counts"]
    assert math.exp(row["nll_per_word,none"]) == pytest.approx(row["word_perplexity,none"], rel=1e-9)


def test_the_mixture_is_the_mean_of_probabilities_whatever_lm_eval_is_given(ensemble, task_folder, ours):
    other = LoraEnsembleLM(adapters=str(ensemble), device="cpu", average="loglikelihood")
    row = evaluate(other, ["pages"], task_folder)["results"]["pages"]
    assert row["nll_per_byte,none"] == pytest.approx(ours["results"]["pages"]["nll_per_byte,none"], abs=1e-7)
    assert math.log(row["byte_perplexity,none"]) == pytest.approx(row["member_nll_per_byte,none"], abs=1e-9)


@pytest.mark.parametrize("task", ["last_word", "pages", "own_counts", "bytes_only"])
def test_every_members_score_is_hfs(task, ours, alone):
    for m, theirs in enumerate(alone):
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            response = other["resps"][0][0]
            expected = response[0] if task == "last_word" else response
            # hf sums in float32, whose step at 4,000 nats is 5e-4
            step = float(np.spacing(np.float32(abs(expected))))
            assert mine["members"][m] == pytest.approx(float(expected), abs=max(1e-4, step))
    differing = [sample["members"] for sample in ours["samples"][task]]
    assert np.ptp(differing, axis=1).min() > 1e-2


def test_one_member_prints_what_hf_prints_and_does_not_disagree(ensemble, task_folder, alone):
    single = LoraEnsembleLM(adapters=str(ensemble / "member_00"), device="cpu")
    found = evaluate(single, TASKS, task_folder)["results"]
    for task, row in alone[0]["results"].items():
        for name in ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity", "acc"):
            if f"{name},none" in row:
                assert found[task][f"{name},none"] == pytest.approx(row[f"{name},none"], rel=1e-5), name
        assert found[task]["reverse_mutual_information,none"] == 0.0
        assert found[task]["nll_per_token,none"] == found[task]["member_nll_per_token,none"]


def test_equal_members_do_not_disagree(llama, tmp_path, task_folder):
    random_adapters(llama, tmp_path / "members", 1)
    shutil.copytree(tmp_path / "members" / "member_00", tmp_path / "members" / "member_01")
    row = evaluate(LoraEnsembleLM(adapters=str(tmp_path / "members"), device="cpu"), ["pages"], task_folder)
    assert row["results"]["pages"]["reverse_mutual_information,none"] == pytest.approx(0.0, abs=1e-7)


# ------------------------------------------------------------------------------------- standard errors


def test_standard_errors_are_the_ratio_estimators(ours):
    pairs = np.array([sample["nll_per_token"] for sample in ours["samples"]["last_word"]])
    value = pairs[:, 0].sum() / pairs[:, 1].sum()
    residuals = pairs[:, 0] - value * pairs[:, 1]
    n = len(pairs)
    expected = math.sqrt((residuals**2).sum() / (n * (n - 1))) / pairs[:, 1].mean()
    assert ours["results"]["last_word"]["nll_per_token_stderr,none"] == pytest.approx(expected, abs=1e-12)


def test_the_ratios_standard_error_is_that_of_many_samples():
    draw = np.random.default_rng(5)
    found = []
    for _ in range(4000):
        counts = draw.integers(1, 40, size=60)
        values = counts * draw.gamma(4.0, 0.5, size=60)
        numbers = linearised(values, counts)
        found.append((ratio(values, counts), scipy.stats.sem(numbers)))
        assert numbers.mean() == pytest.approx(found[-1][0], rel=1e-12)
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.05)


# ------------------------------------------------------------------------------------------ closed forms


def test_the_examples_in_the_docstrings():
    found = doctest.testmod(string_metrics)
    assert found.attempted >= 4 and not found.failed


def test_closed_forms():
    found = quantities([[-2.0, -3.0, -5000.0], [-2.0, -3.0 - math.log(3), -5000.0]])
    np.testing.assert_allclose(found["nll"], [2.0, 3.0 - math.log(2 / 3), 5000.0], rtol=1e-15)
    np.testing.assert_allclose(found["member_nll"], [2.0, 3.0 + math.log(3) / 2, 5000.0], rtol=1e-15)
    assert found["reverse_mutual_information"][[0, 2]].tolist() == [0.0, 0.0]
    # one member right by ever more: ln N less than the gap's mean
    far = quantities([[-1000.0], [-2000.0]])["reverse_mutual_information"]
    np.testing.assert_allclose(far, [500.0 - math.log(2)], rtol=1e-15)
    assert np.isnan(quantities([[-np.inf], [-np.inf]])["reverse_mutual_information"]).all()
    assert math.isnan(ratio([1.0, 2.0], [3, np.nan])) and math.isnan(ratio([0.0], [0]))


@given(
    arrays.arrays(
        np.float64,
        arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
        elements=st.floats(-1e5, 0, allow_nan=False),
    )
)
def test_reverse_mutual_information_is_not_negative_and_is_the_difference(scores):
    found = quantities(scores)
    rounding = 1e-15 * np.ptp(scores, axis=0)
    assert (found["reverse_mutual_information"] >= -rounding).all()
    difference = found["member_nll"] - found["nll"]
    np.testing.assert_allclose(found["reverse_mutual_information"], difference, atol=1e-9)


# ----------------------------------------------------------------------------- the tokens' way through


def test_tokens_survive_pickle_copies_and_filters():
    value = EnsembleLoglikelihood.average([-1.0, -2.5], tokens=7)
    for twin in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
        assert twin == value and twin.tokens == 7 and twin.members.tolist() == [-1.0, -2.5]


def test_scores_that_release_0_1_0_pickled_have_no_tokens(tmp_path):
    cache = SqliteDict(shutil.copy(DATA / "release_0_1_0" / "scores_rank0.db", tmp_path))
    read_older_scores(cache)
    scores = [value[0] for key, value in cache.items() if key != OWNER_KEY]
    assert len(scores) > 50
    assert {(type(score), len(score.members), score.tokens) for score in scores} == {
        (EnsembleLoglikelihood, 2, None)
    }


def test_every_kind_of_request_says_its_tokens(ensemble):
    model = LoraEnsembleLM(adapters=str(ensemble), device="cpu")
    pair, string = ("which member", " adapter layer"), ("member adapter " * 150,)
    ((score, _),) = model.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    whole = len(model.tokenizer.encode("".join(pair))) - len(model.tokenizer.encode(pair[0]))
    assert score.tokens == whole > 1
    (score,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, string, 0)])
    assert score.tokens == len(model.tokenizer.encode(string[0])) > model.max_length


def test_a_cache_is_read_with_its_tokens(ensemble, task_folder, tmp_path, ours, monkeypatch):
    def once() -> dict:
        model = LoraEnsembleLM(adapters=str(ensemble), device="cpu")
        return evaluate(model, TASKS, task_folder, use_cache=str(tmp_path / "cache"))

    first = once()
    assert first["results"] == ours["results"]
    scored = []
    monkeypatch.setattr(
        LoraEnsembleLM, "_scores", lambda self, requests, _: scored.extend(requests) or iter(())
    )
    assert once()["results"] == first["results"] and not scored


def test_an_older_cache_gives_stated_nans_and_the_rest(
    ensemble, task_folder, tmp_path, ours, monkeypatch, caplog
):
    def once() -> dict:
        model = LoraEnsembleLM(adapters=str(ensemble), device="cpu")
        return evaluate(model, TASKS, task_folder, use_cache=str(tmp_path / "cache"))

    with monkeypatch.context() as then:
        then.setattr(
            EnsembleLoglikelihood, "__reduce__", lambda self: (type(self), (float(self), self.members))
        )
        once()
    strings._warn_once.cache_clear()
    row, expected = once()["results"]["pages"], ours["results"]["pages"]
    for name in STRING_METRICS:
        if name in PER_TOKEN:
            assert math.isnan(row[f"{name},none"]) and math.isnan(row[f"{name}_stderr,none"]), name
        else:
            assert row[f"{name},none"] == expected[f"{name},none"], name
    assert "task pages has scores that do not say their number of tokens" in caplog.text


def command(ensemble: Path, folder: Path, output: Path) -> list[str]:
    return [
        *("-m", "lm_eval_lora_ensemble", "run", "--model", "lora-ensemble"),
        *("--model_args", f"adapters={ensemble}", "--device", "cpu", "--tasks", ",".join(TASKS)),
        *("--include_path", str(folder), "--log_samples", "--output_path", str(output)),
    ]


@pytest.fixture(scope="module")
def saved(ensemble, task_folder, tmp_path_factory) -> Path:
    """What lm-eval's command wrote, scored by two processes."""
    output = tmp_path_factory.mktemp("two")
    done = in_two_processes(*command(ensemble, task_folder, output), DISABLE_MULTIPROC="1")
    assert "reverse_mutual_information" in done.stdout
    return output


def test_two_processes_give_the_same_results(saved, ours):
    (file,) = saved.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    for task, row in ours["results"].items():
        for key, value in row.items():
            if isinstance(value, float) and not key.startswith("perplexity_stderr"):
                assert found[task][key] == pytest.approx(value, rel=1e-6, abs=1e-5), (task, key)
    (file,) = saved.rglob("samples_pages_*.jsonl")
    samples = {sample["doc_id"]: sample for sample in map(json.loads, file.open())}
    for theirs in ours["samples"]["pages"]:
        mine = samples[theirs["doc_id"]]
        np.testing.assert_allclose(mine["members"], theirs["members"], atol=1e-3)
        assert mine["nll_per_token"][1] == theirs["nll_per_token"][1]


# ------------------------------------------------------------------------------------ tasks and groups


def test_a_group_is_the_ratio_over_all_its_documents(ours, llama):
    tokenizer = HFLM(pretrained=str(llama), device="cpu").tokenizer
    row = ours["results"]["written"]
    pairs = [s["nll_per_byte"] for task in ("own_counts", "bytes_only") for s in ours["samples"][task]]
    values, counts = np.array(pairs).T
    assert row["nll_per_byte,none"] == pytest.approx(values.sum() / counts.sum(), abs=1e-12)
    assert row["nll_per_byte_stderr,none"] == pytest.approx(
        scipy.stats.sem(linearised(values, counts)), abs=1e-12
    )
    both = [(task, s) for task in ("own_counts", "bytes_only") for s in ours["samples"][task]]
    tokens = sum(len(tokenizer.encode(texts_of(task, s)[0])) for task, s in both)
    disagreement = sum(s["reverse_mutual_information"][0] for _, s in both)
    assert row["reverse_mutual_information,none"] == pytest.approx(disagreement / tokens, abs=1e-12)
    assert row["members,none"] == 3
    assert "nll_per_word,none" not in row  # bytes_only counts no words


@pytest.mark.parametrize("limit", [1, 4])
def test_few_documents_give_finite_values(ensemble, task_folder, limit):
    found = evaluate(LoraEnsembleLM(adapters=str(ensemble), device="cpu"), TASKS, task_folder, limit=limit)
    for task, row in found["results"].items():
        values = {key: value for key, value in row.items() if key.partition(",")[0] in STRING_METRICS}
        assert len(values) >= 3 and all(math.isfinite(value) for value in values.values()), task
        missing = {value for key, value in row.items() if "_stderr" in key and value == "N/A"}
        assert missing == {"N/A"}  # of members, and of all with one document


def test_other_models_report_what_they_always_did(alone, ours, llama, ensemble, task_folder):
    """``alone`` or ``ours`` came first, and it does not matter which."""
    after = evaluate(HFLM(pretrained=str(llama), device="cpu"), TASKS, task_folder)
    keys = {key.partition(",")[0] for row in after["results"].values() for key in row}
    assert not keys & {*STRING_METRICS, "members"}
    assert "members" not in after["samples"]["pages"][0]
    assert [*after["higher_is_better"]["last_word"]] == ["perplexity", "acc"]
    quiet = LoraEnsembleLM(adapters=str(ensemble), device="cpu", uncertainty_metrics=False)
    row = evaluate(quiet, ["pages"], task_folder)["results"]["pages"]
    assert not {key.partition(",")[0] for key in row} & {*STRING_METRICS, "members"}


def test_our_task_class_takes_a_plain_model_for_one_member(llama, tmp_path, caplog):
    write_string_tasks(tmp_path)
    with (tmp_path / "pages.yaml").open("a") as stream:
        stream.write("class: !function lm_eval_lora_ensemble.harness.UncertaintyTask\n")
    strings._warn_once.cache_clear()
    row = evaluate(HFLM(pretrained=str(llama), device="cpu"), ["pages"], tmp_path)["results"]["pages"]
    assert row["members,none"] == 1
    assert math.exp(row["nll_per_byte,none"]) == pytest.approx(row["byte_perplexity,none"], rel=1e-9)
    assert math.isnan(row["nll_per_token,none"]) and "per token are NaN" in caplog.text


def test_a_name_that_the_task_reports_itself_stays_its_own(ensemble, tmp_path):
    write_string_tasks(tmp_path)
    (tmp_path / "own_count.py").write_text(
        "def count_raw_page(doc, results):\n    return {'nll_per_token': 0.5}\n"
    )
    found = evaluate(LoraEnsembleLM(adapters=str(ensemble), device="cpu"), ["own_counts"], tmp_path)
    row = found["results"]["own_counts"]
    assert row["nll_per_token,none"] == 0.5
    assert row["ensemble_nll_per_token,none"] == pytest.approx(
        row["member_nll_per_token,none"] - row["reverse_mutual_information,none"], abs=1e-12
    )


def test_a_document_of_several_strings_is_left_as_it_is(ensemble, tmp_path, caplog):
    write_string_tasks(tmp_path)
    (tmp_path / "several.py").write_text(
        "from lm_eval.api.instance import Instance\n"
        "from lm_eval.api.task import ConfigurableTask\n"
        "class Several(ConfigurableTask):\n"
        "    def __init__(self, config, **kwargs):\n"
        "        super().__init__(config={k: v for k, v in config.items() if k != 'class'}, **kwargs)\n"
        "    def construct_requests(self, doc, ctx, **kwargs):\n"
        "        kwargs.pop('apply_chat_template', None), kwargs.pop('chat_template', None)\n"
        "        ends = enumerate((' a', ' b'))\n"
        "        return [Instance('loglikelihood', doc, (ctx, end), i, **kwargs) for i, end in ends]\n"
    )
    with (tmp_path / "last_word.yaml").open("a") as stream:
        stream.write("class: !function several.Several\n")
    with caplog.at_level(logging.WARNING):
        found = evaluate(LoraEnsembleLM(adapters=str(ensemble), device="cpu"), ["last_word"], tmp_path)
    assert not {key.partition(",")[0] for key in found["results"]["last_word"]} & {*STRING_METRICS, "members"}
    assert "task last_word scores several strings a document" in caplog.text


def test_scores_of_two_ensembles_are_not_put_together():
    with pytest.raises(EnsembleError, match=r"different numbers of members \(\[2, 3\]\)"):
        strings._number_of_members([[-1.0, -2.0], [-1.0, -2.0, -3.0]])


# --------------------------------------------------------------------------------------------- analysis


def test_analyse_reads_what_was_saved(saved, ours, tmp_path, capsys):
    command = ["analyse", str(saved), "--resamples", "500", "--json", str(tmp_path / "now.json")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "pages: 6 whole strings" in printed and "left out: pages" not in printed
    (run,) = json.loads((tmp_path / "now.json").read_text())["runs"]
    for task in ("last_word", "pages", "own_counts", "bytes_only"):
        row, found = ours["results"][task], run["strings"][task]
        shown = {key.partition(",")[0] for key in row} & set(STRING_METRICS)
        assert found["metrics"].keys() == shown
        for name, estimate in found["metrics"].items():
            # two processes lay their requests out in other passes
            assert estimate["value"] == pytest.approx(row[f"{name},none"], rel=1e-6, abs=1e-5), (task, name)
            assert estimate["bca"][0] is None or estimate["bca"][0] <= estimate["value"] <= estimate["bca"][1]
        for name, members in found["members"].items():
            assert np.mean(members) == pytest.approx(row[f"member_{name},none"], rel=1e-6, abs=1e-5)
    # two ways to the same standard error
    estimate = run["strings"]["last_word"]["metrics"]["nll_per_token"]
    expected = ours["results"]["last_word"]["nll_per_token_stderr,none"]
    assert estimate["standard_error"] == pytest.approx(expected, rel=0.2)


def test_the_report_says_that_whole_strings_are_left_out(saved, tmp_path, capsys):
    assert cli.main(["report", str(saved), "--output", str(tmp_path / "report"), "--resamples", "20"]) != 0
    assert "pages: its documents are whole strings without choices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": [-1.0, -2.0]}, r"line 2: 2 members, 3 before"),
        ({"doc_id": 0}, r"line 2: document 0 occurs twice"),
        ({"nll_per_token": [3.5, 4]}, r"line 2: the logged nll_per_token does not follow from the scores"),
        ({"nll_per_byte": "x"}, r"line 2: not a sample of whole strings"),
        ({"members": [[-1.0, -2.0, -3.0]]}, r"line 2: not a sample of whole strings"),
    ],
)
def test_samples_that_cannot_be_trusted_are_refused(saved, tmp_path, change, message):
    (file,) = saved.rglob("samples_pages_*.jsonl")
    lines = sorted((json.loads(line) for line in file.open()), key=lambda line: line["doc_id"])
    lines[1].update(change)
    (tmp_path / file.name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(EnsembleError, match=message):
        load_runs(tmp_path)


def test_a_logged_name_of_the_tasks_own_is_not_taken_for_ours():
    reader = StringReader(Path("samples.jsonl"))
    mine = quantities([[-4.0], [-6.0]])
    sample = {"doc_id": 0, "members": [-4.0, -6.0], "nll_per_token": 0.5}
    reader.add({**sample, "ensemble_nll_per_token": [float(mine["nll"][0]), 2]}, 1)
    found = evaluate_strings(reader.scores(), ResamplingPlan(1, 10))
    assert found.metrics["nll_per_token"].value == pytest.approx(float(mine["nll"][0]) / 2)
    assert found.members["nll_per_token"] == (2.0, 3.0)
