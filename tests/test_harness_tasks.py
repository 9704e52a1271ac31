"""The whole way: lm-eval's command, its files, and every number in them computed again by others."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import independent_battery as independent
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
import torchmetrics.functional.classification as torchmetrics
from conftest import HUB, needs_hub, random_adapters, tiny_model
from harness_tasks import write_own_scoring, write_tasks
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from two_processes import in_two_processes

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.document import document_metrics
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.harness.state import UncertaintyState
from lm_eval_lora_ensemble.harness.tasks import UncertaintyTask
from lm_eval_lora_ensemble.metrics import information
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.detection import detect

TASKS = ("both", "varies_context", "several_golds", "quickstart_invented", "quickstart_countries")
OURS = ("nll", "brier_score", "ece", "rms_ce", "predictive_entropy", "expected_entropy", "mutual_information")


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def command(ensemble: Path, task_folder: Path, output: Path, *extra: str) -> list[str]:
    return [
        *("-m", "lm_eval_lora_ensemble", "run", "--model", "lora-ensemble"),
        *("--model_args", f"adapters={ensemble}", "--device", "cpu", "--tasks", ",".join(TASKS)),
        *("--include_path", str(task_folder), "--limit", "24", "--log_samples", "--output_path", str(output)),
        *extra,
    ]


def run(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=500, check=False, **kwargs
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def read(output: Path) -> tuple[dict, dict[str, list[dict]]]:
    """Return the results file and the samples of each task."""
    (file,) = output.rglob("results_*.json")
    samples = {
        path.name.removeprefix("samples_").rsplit("_", 1)[0]: [json.loads(line) for line in path.open()]
        for path in output.rglob("samples_*.jsonl")
    }
    return json.loads(file.read_text()), samples


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def one_process(ensemble, task_folder, output):
    done = run(*command(ensemble, task_folder, output))
    return *read(output), done


def gold_of(task: str, sample: dict) -> int:
    return sample["doc"]["gold"] if task == "varies_context" else int(sample["target"])


def recomputed(task: str, samples: list[dict]) -> dict[str, float]:
    """The metrics of the harness from a task's samples alone."""
    documents = [independent.Document(np.array(s["members"]), gold_of(task, s)) for s in samples]
    # acc compares scores of the choices as they are, which are not distributions over them
    right = [np.argmax(_ensemble_scores(s)) == d.gold for s, d in zip(samples, documents, strict=True)]
    found = independent.battery(documents)
    return {"acc": float(np.mean(right)), **{metric: found[metric] for metric in OURS}}


def _ensemble_scores(sample: dict) -> np.ndarray:
    return scipy.special.logsumexp(np.array(sample["members"]), axis=0)


@pytest.mark.parametrize(
    "task", ["plain_a", "plain_b", "varies_context", "quickstart_invented", "quickstart_countries"]
)
def test_every_metric_follows_from_the_samples(one_process, task):
    results, samples, _ = one_process
    row = results["results"][task]
    for metric, value in recomputed(task, samples[task]).items():
        assert row[f"{metric},none"] == pytest.approx(value, abs=1e-6), metric
    assert row["members,none"] == 3
    assert row["nll_stderr,none"] == pytest.approx(
        scipy.stats.sem([s["nll"] for s in samples[task]]), abs=1e-6
    )


def test_the_battery_reads_what_lm_eval_wrote(one_process, output):
    """Real files, the real reader, and scikit-learn on the same samples."""
    saved = load_runs(output)[0]
    for task in ("quickstart_countries", "quickstart_invented"):
        samples = one_process[1][task]
        predictions = saved.predictions(task)
        battery = {name: value[0] for name, value in Battery(predictions)(np.ones((1, len(samples)))).items()}
        row = one_process[0]["results"][task]
        for metric in OURS:
            assert battery[metric] == pytest.approx(row[f"{metric},none"], abs=1e-9), metric
        wrong = [1 - sample["ece"][1] for sample in samples]
        for score, name in (("predictive_entropy", "entropy"), ("mutual_information", "mutual_information")):
            values = [sample[score] for sample in samples]
            assert battery[f"error_auroc_{name}"] == pytest.approx(
                sklearn.metrics.roc_auc_score(wrong, values)
            )
            expected = sklearn.metrics.average_precision_score(wrong, values)
            assert battery[f"error_aupr_{name}"] == pytest.approx(expected)
    several = saved.predictions("several_golds")
    assert several.is_gold.sum(axis=1).tolist() == [2] * 4
    assert float(np.mean(-several.log_gold_mass)) == pytest.approx(
        one_process[0]["results"]["several_golds"]["nll,none"], abs=1e-9
    )
    inside, outside = (saved.predictions(f"quickstart_{name}") for name in ("countries", "invented"))
    found = detect(inside, outside, resamples=10)
    entropies = [
        [sample["predictive_entropy"] for sample in one_process[1][f"quickstart_{name}"]]
        for name in ("countries", "invented")
    ]
    labels = [0] * len(entropies[0]) + [1] * len(entropies[1])
    expected = sklearn.metrics.roc_auc_score(labels, [*entropies[0], *entropies[1]])
    assert found["entropy"].auroc.value == pytest.approx(expected)


def test_groups_pool_calibration_over_documents(one_process):
    results, samples, _ = one_process
    row, parts = results["results"]["both"], (results["results"]["plain_a"], results["results"]["plain_b"])
    pooled = recomputed("plain_a", [*samples["plain_a"], *samples["plain_b"]])
    for metric in ("acc", *OURS):
        assert row[f"{metric},none"] == pytest.approx(pooled[metric], abs=1e-6), metric
    assert row["ece_macro,none"] == pytest.approx(np.mean([part["ece,none"] for part in parts]))
    assert abs(row["ece,none"] - row["ece_macro,none"]) > 1e-3
    assert row["members,none"] == 3
    assert results["groups"]["both"]["ece,none"] == row["ece,none"]


NEED_NO_GOLD = {"predictive_entropy", "expected_entropy", "mutual_information"}


def assert_only_what_needs_no_gold(row: dict, samples: list[dict]) -> None:
    ours = {key.partition(",")[0] for key in row} & {*OURS, "members", "golds", "other_class"}
    assert ours == {*NEED_NO_GOLD, "members"}
    for metric in NEED_NO_GOLD:
        documents = [independent.Document(np.array(s["members"]), 0) for s in samples]
        assert row[f"{metric},none"] == pytest.approx(independent.battery(documents)[metric], abs=1e-9)
    assert row["members,none"] == 3


def test_several_gold_answers_all_count(one_process):
    results, samples, done = one_process
    row, logged = results["results"]["several_golds"], samples["several_golds"]
    assert {tuple(s["golds"]) for s in logged} == {(0, 2)}
    p = [scipy.special.softmax(np.array(s["members"]), axis=1).mean(axis=0) for s in logged]
    mass = [q[0] + q[2] for q in p]
    assert row["nll,none"] == pytest.approx(-np.mean(np.log(mass)), abs=1e-6)
    brier = [(1 - m) ** 2 + q[1] ** 2 + q[3] ** 2 for m, q in zip(mass, p, strict=True)]
    assert row["brier_score,none"] == pytest.approx(np.mean(brier), abs=1e-6)
    right = torch.tensor([int(q.argmax() in (0, 2)) for q in p])
    confidence = torch.tensor([q.max() for q in p])
    assert row["ece,none"] == pytest.approx(
        float(torchmetrics.binary_calibration_error(confidence, right, n_bins=15, norm="l1")), abs=1e-6
    )
    assert "several gold answers" not in done.stderr


def test_a_task_without_golds_is_left_out_of_analysis_and_report_and_stops_neither(
    one_process, output, tmp_path, capsys
):
    saved = Path(shutil.copytree(output, tmp_path / "saved"))
    (path,) = saved.rglob("samples_several_golds_*.jsonl")
    lines = [json.loads(line) for line in path.open()]
    kept = [{key: value for key, value in line.items() if key not in ("nll", "golds")} for line in lines]
    path.write_text("".join(json.dumps({**line, "golds": []}) + "\n" for line in kept))
    assert cli.main(["analyse", str(saved), "--resamples", "20"]) == 0
    assert "left out: several_golds: gold answers unknown" in capsys.readouterr().out
    assert cli.main(["report", str(saved), "--output", str(tmp_path / "report"), "--resamples", "20"]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "plain_a" in page and "several_golds" in page


def test_golds_that_are_none_are_not_taken_for_any(ensemble, tmp_path, caplog):
    """As in truthfulqa_mc2, ``doc_to_target: 0`` is not the answer; an nll and an ece of it were printed once."""
    found = evaluate(
        LoraEnsembleLM(adapters=str(ensemble), device="cpu"), ["own_scoring"], write_own_scoring(tmp_path)
    )
    row, samples = found["results"]["own_scoring"], found["samples"]["own_scoring"]
    assert 0 < row["acc,none"] < 1
    assert_only_what_needs_no_gold(row, samples)
    assert all(sample["golds"] == [] for sample in samples)
    assert caplog.text.count("task own_scoring scores answers by a rule of its own: metrics that need") == 1


def test_a_subclass_with_its_own_scoring_has_no_golds_either(llama, tmp_path):
    write_tasks(tmp_path)
    (tmp_path / "scored.py").write_text(
        "from lm_eval_lora_ensemble.harness import UncertaintyTask\n"
        "class Scored(UncertaintyTask):\n"
        "    def process_results(self, doc, results):\n"
        "        return {**super().process_results(doc, results), 'acc': 0.25}\n"
    )
    text = (tmp_path / "plain_a.yaml").read_text()
    (tmp_path / "plain_a.yaml").write_text(text + "class: !function scored.Scored\n")
    row = evaluate(HFLM(pretrained=str(llama), device="cpu"), ["plain_a"], tmp_path)["results"]["plain_a"]
    assert row["acc,none"] == 0.25
    assert "predictive_entropy,none" in row and "nll,none" not in row and "ece,none" not in row


def test_samples_say_what_was_known_and_the_table_does_not_show_it(one_process, task_folder):
    results, samples, _ = one_process
    for task in ("plain_a", "varies_context"):
        assert {s["fold"] for s in samples[task]} == {int(s["doc_hash"][:8], 16) % 5 for s in samples[task]}
        lengths = [[len(choice) for choice in s["doc"]["choices"]] for s in samples[task]]
        logged = [s["lengths"].get("chars") for s in samples[task]]
        assert logged == (lengths if task == "plain_a" else [None] * len(lengths))
        rows = [json.loads(line) for line in (task_folder / f"{task}.jsonl").read_text().splitlines()]
        assert [s["golds"] for s in samples[task]] == [[row["gold"]] for row in rows][: len(samples[task])]
        assert {s["other_class"] for s in samples[task]} == {False}
        shown = {key.partition(",")[0] for key in results["results"][task]}
        logged_only = {"golds", "other_class", "lengths", "fold"}
        assert not shown & {*logged_only, *(f"{name}_stderr" for name in logged_only)}
        assert set(OURS) < shown


def test_the_gold_is_read_and_not_guessed(one_process, output, tmp_path):
    """Without nll and with a misleading target nothing but the logged gold can tell."""
    (path,) = output.rglob("samples_varies_context_*.jsonl")
    lines = [json.loads(line) for line in path.open()]
    for line in lines:
        line.pop("nll")
        line["target"] = "0"
    (tmp_path / path.name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = load_runs(tmp_path)
    assert run.predictions("varies_context").is_gold.argmax(1).tolist() == [
        line["doc"]["gold"] for line in lines
    ]
    assert {line["doc"]["gold"] for line in lines} == {0, 1}


def test_a_name_that_the_task_reports_itself_stays_its_own(ensemble, llama, tmp_path, caplog):
    """lm-eval has a ``brier_score`` too, of the loglikelihoods that it sees."""
    write_tasks(tmp_path)
    file = tmp_path / "varies_context.yaml"
    theirs = "- {metric: brier_score, aggregation: brier_score, higher_is_better: false}\n"
    assert "metric_list:\n" in file.read_text()
    file.write_text(file.read_text().replace("metric_list:\n", f"metric_list:\n{theirs}"))
    listed = "aggregate_metric_list: [{metric: acc}, {metric: nll}]"
    (tmp_path / "mixed.yaml").write_text(f"group: mixed\ntask: [plain_b, varies_context]\n{listed}\n")
    adapter = str(ensemble / "member_00")
    single = HFLM(pretrained=str(llama), peft=adapter, device="cpu")
    stock = evaluate(single, ["varies_context"], tmp_path)["results"]["varies_context"]
    found = evaluate(LoraEnsembleLM(adapters=adapter, device="cpu"), ["mixed"], tmp_path)
    row, samples = found["results"]["varies_context"], found["samples"]["varies_context"]
    assert row["brier_score,none"] == pytest.approx(stock["brier_score,none"], abs=1e-5)
    documents = [independent.Document(np.array(s["members"]), s["golds"][0]) for s in samples]
    expected = independent.battery(documents)["brier_score"]
    assert row["ensemble_brier_score,none"] == pytest.approx(expected, abs=1e-9)
    warning = "task varies_context reports a brier_score of its own: ours is called ensemble_brier_score"
    assert warning in caplog.text
    assert "brier_score,none" not in found["results"]["mixed"]
    assert "nll,none" in found["results"]["mixed"] and "ece,none" in found["results"]["mixed"]


def test_the_results_file_identifies_the_ensemble(one_process, ensemble):
    config = one_process[0]["config"]
    assert len(config["lora_ensemble"]["fingerprint"]) == 64
    assert [member["name"] for member in config["lora_ensemble"]["members"]] == [
        f"member_{i:02d}" for i in range(3)
    ]
    assert config["lora_ensemble"]["device"] == "cpu"
    assert config["lora_ensemble"]["dtype"] == "float32"
    assert config["lora_ensemble"]["versions"]["torch"] == torch.__version__
    assert [config[f"{name}_seed"] for name in ("random", "numpy", "torch", "fewshot")] == [
        0,
        1234,
        1234,
        1234,
    ]


def test_a_repeated_run_is_equal_to_the_last_bit(one_process, ensemble, task_folder, tmp_path):
    run(*command(ensemble, task_folder, tmp_path))
    results, samples = read(tmp_path)
    np.testing.assert_equal(results["results"], one_process[0]["results"])
    np.testing.assert_equal(results["groups"], one_process[0]["groups"])
    assert samples == one_process[1]
    assert any(sample["members"] for sample in samples["plain_a"])


def test_two_processes_give_the_same_results(one_process, ensemble, task_folder, tmp_path):
    done = in_two_processes(*command(ensemble, task_folder, tmp_path))
    assert "contexts for plain_a on rank 1" in done.stderr
    results, samples = read(tmp_path)
    for task, row in one_process[0]["results"].items():
        for metric, value in row.items():
            if isinstance(value, float):
                assert results["results"][task][metric] == pytest.approx(value, abs=1e-5, nan_ok=True), (
                    task,
                    metric,
                )
    for task, rows in samples.items():
        theirs = {s["doc_id"]: s.get("members") for s in one_process[1][task]}
        for sample in rows:
            if "members" in sample:
                np.testing.assert_allclose(sample["members"], theirs[sample["doc_id"]], atol=1e-4)


def evaluate(model, tasks, task_folder, **kwargs):
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    return simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **kwargs)


def test_other_models_report_what_they_always_did(ensemble, llama, task_folder):
    before = evaluate(HFLM(pretrained=str(llama), device="cpu"), ["both"], task_folder)
    evaluate(LoraEnsembleLM(adapters=str(ensemble), device="cpu"), ["both"], task_folder)
    after = evaluate(HFLM(pretrained=str(llama), device="cpu"), ["both"], task_folder)
    for kind in ("results", "higher_is_better", "n-samples"):
        assert after[kind] == before[kind]
    assert [sorted(s) for s in after["samples"]["plain_a"]] == [
        sorted(s) for s in before["samples"]["plain_a"]
    ]


def test_uncertainty_metrics_can_be_turned_off(ensemble, task_folder):
    quiet = LoraEnsembleLM(adapters=str(ensemble), device="cpu", uncertainty_metrics=False)
    row = evaluate(quiet, ["plain_a"], task_folder)["results"]["plain_a"]
    assert "nll,none" not in row and "acc,none" in row


def test_members_survive_the_cache(ensemble, task_folder, tmp_path):
    runs = [
        evaluate(
            LoraEnsembleLM(adapters=str(ensemble), device="cpu"),
            ["plain_a"],
            task_folder,
            use_cache=str(tmp_path / "cache"),
        )
        for _ in range(2)
    ]
    np.testing.assert_equal(runs[0]["results"], runs[1]["results"])
    assert [s["members"] for s in runs[0]["samples"]["plain_a"]] == [
        s["members"] for s in runs[1]["samples"]["plain_a"]
    ]


def test_our_tasks_report_uncertainty_for_a_single_model(llama, tmp_path):
    write_tasks(tmp_path)
    text = (tmp_path / "plain_a.yaml").read_text()
    extra = "class: !function lm_eval_lora_ensemble.harness.UncertaintyTask\nuncertainty: {bins: 5}\n"
    (tmp_path / "plain_a.yaml").write_text(text + extra)
    results = evaluate(HFLM(pretrained=str(llama), device="cpu"), ["plain_a"], tmp_path)
    row, samples = results["results"]["plain_a"], results["samples"]["plain_a"]
    assert row["members,none"] == 1 and row["mutual_information,none"] == pytest.approx(0, abs=1e-12)
    confidence = torch.tensor([s["ece"][0] for s in samples])
    right = torch.tensor([int(s["ece"][1]) for s in samples])
    assert row["ece,none"] == pytest.approx(
        float(torchmetrics.binary_calibration_error(confidence, right, n_bins=5, norm="l1")), abs=1e-6
    )


def test_an_unknown_uncertainty_option_is_named():
    with pytest.raises(EnsembleError, match=r"task t, key uncertainty: .*'bin'"):
        UncertaintyTask({"task": "t", "uncertainty": {"bin": 3}})


def test_further_metrics_by_name(llama, tmp_path):
    write_tasks(tmp_path)
    text = (tmp_path / "plain_a.yaml").read_text()
    extra = (
        "class: !function lm_eval_lora_ensemble.harness.UncertaintyTask\n"
        "uncertainty: {metrics: [error_auroc_entropy, accuracy_at_50_coverage]}\n"
    )
    (tmp_path / "plain_a.yaml").write_text(text + extra)
    results = evaluate(HFLM(pretrained=str(llama), device="cpu"), ["plain_a"], tmp_path)
    samples = results["samples"]["plain_a"]
    wrong = [1 - s["ece"][1] for s in samples]
    entropy = [s["predictive_entropy"] for s in samples]
    expected = sklearn.metrics.roc_auc_score(wrong, entropy)
    assert results["results"]["plain_a"]["error_auroc_entropy,none"] == pytest.approx(expected, abs=1e-9)
    assert results["higher_is_better"]["plain_a"]["error_auroc_entropy"] is True
    with pytest.raises(EnsembleError, match=r"no metric 'aurc_entropi'; the nearest is 'aurc_entropy'"):
        UncertaintyState(metrics=["aurc_entropi"])


def test_mutual_information_below_zero_is_an_error(monkeypatch):
    # entropies swapped: what a wrong implementation upstream of the check would produce
    original = information.entropy
    monkeypatch.setattr(information, "entropy", lambda q: original(q) * (1 if np.ndim(q) == 3 else 0))
    with pytest.raises(EnsembleError, match="cannot be negative"):
        document_metrics(np.zeros((2, 3)), [0], metrics=["mutual_information"])


@pytest.fixture(scope="module")
def stock_tasks() -> TaskManager:
    return TaskManager()


@needs_hub
@pytest.mark.parametrize(
    ("task", "shots"), [("arc_easy", 0), ("arc_challenge", 2), ("hellaswag", 0), ("mmlu_anatomy", 5)]
)
def test_members_equal_hf_on_real_questions(task, shots, stock_tasks, tmp_path_factory, monkeypatch):
    base, adapters = _long_model(tmp_path_factory)
    monkeypatch.chdir(HUB)
    arguments = {
        "tasks": [task],
        "num_fewshot": shots,
        "limit": 6,
        "bootstrap_iters": 0,
        "task_manager": stock_tasks,
    }
    ours = simple_evaluate(model=LoraEnsembleLM(adapters=str(adapters), device="cpu"), **arguments)
    for i in range(2):
        single = HFLM(
            pretrained=str(base), peft=str(adapters / f"member_{i:02d}"), device="cpu", batch_size=4
        )
        theirs = simple_evaluate(model=single, **arguments)
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            expected = [score for ((score, _),) in other["resps"]]
            np.testing.assert_allclose(np.array(mine["members"])[i], expected, atol=1e-4)


_LONG: list[tuple[Path, Path]] = []


def _long_model(factory) -> tuple[Path, Path]:
    """A tiny model whose window holds a few-shot prompt; made once."""
    if not _LONG:
        base = tiny_model(factory.mktemp("long") / "tiny-llama", "llama", max_position_embeddings=4096)
        _LONG.append((base, random_adapters(base, factory.mktemp("long-adapters"), 2)))
    return _LONG[0]


def test_context_varying_tasks_equal_hf(ensemble, llama, task_folder, caplog):
    with caplog.at_level(logging.ERROR):
        ours = evaluate(LoraEnsembleLM(adapters=str(ensemble), device="cpu"), ["varies_context"], task_folder)
        for i in range(3):
            single = HFLM(pretrained=str(llama), peft=str(ensemble / f"member_{i:02d}"), device="cpu")
            theirs = evaluate(single, ["varies_context"], task_folder)
            for mine, other in zip(*(r["samples"]["varies_context"] for r in (ours, theirs)), strict=True):
                expected = [score for ((score, _),) in other["resps"]]
                np.testing.assert_allclose(np.array(mine["members"])[i], expected, atol=1e-4)


CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} ; {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def test_chat_template_system_instruction_and_examples_reach_every_member(
    llama, task_folder, tmp_path, edit_json
):
    base = Path(shutil.copytree(llama, tmp_path / "chat"))
    edit_json(base / "tokenizer_config.json", chat_template=CHAT)
    adapters = random_adapters(base, tmp_path / "ensemble", 2)
    asked = {
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "num_fewshot": 2,
        "system_instruction": "answer as a member of an ensemble",
        "limit": 6,
    }
    together = evaluate(
        LoraEnsembleLM(adapters=str(adapters), device="cpu"), ["plain_a"], task_folder, **asked
    )
    for m, adapter in enumerate(sorted(adapters.iterdir())):
        alone = evaluate(
            HFLM(pretrained=str(base), peft=str(adapter), device="cpu"), ["plain_a"], task_folder, **asked
        )
        for mine, theirs in zip(together["samples"]["plain_a"], alone["samples"]["plain_a"], strict=True):
            prompt = mine["arguments"][0][0]
            assert prompt == theirs["arguments"][0][0]
            assert prompt.startswith("system : answer as a member of an ensemble ; user : ")
            assert prompt.count("assistant :") == 3
            expected = [float(response[0][0]) for response in theirs["resps"]]
            np.testing.assert_allclose(mine["members"][m], expected, atol=1e-4)
