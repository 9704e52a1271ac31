from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import datasets
import lm_eval
import lm_eval.tasks
import pytest
from conftest import HUB, PROJECT, needs_hub
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_lora_ensemble.disk import tasks_folder
from lm_eval_lora_ensemble.harness.tasks import UncertaintyTask
from lm_eval_lora_ensemble.tasks.paper import paper_data

STOCK_TASKS = Path(lm_eval.tasks.__file__).parent
STOCK_YAML = {
    "arc_easy_uq": "arc/arc_easy.yaml",
    "arc_challenge_uq": "arc/arc_challenge.yaml",
    "hellaswag_uq": "hellaswag/hellaswag.yaml",
    "commonsense_qa_uq": "commonsense_qa/default.yaml",
    "mmlu_uq_anatomy": "mmlu/default/mmlu_anatomy.yaml",
    "mmlu_uq_high_school_us_history": "mmlu/default/mmlu_high_school_us_history.yaml",
}
PAPER = ("paper_commonsense_qa", "paper_mmlu_stem", "paper_mmlu_social_sciences")
BAYESIAN_LORA = (  # the six sets in the literature's order
    "paper_winogrande_s",
    "paper_arc_challenge",
    "paper_arc_easy",
    "paper_winogrande_m",
    "paper_openbookqa",
    "paper_boolq",
)
LETTERS = (*BAYESIAN_LORA, "paper_hellaswag")  # tests/test_letters.py
QUICKSTART = ("quickstart_countries", "quickstart_invented")
MMLU_GROUPS = ("mmlu_uq", "mmlu_uq_stem", "mmlu_uq_humanities", "mmlu_uq_social_sciences", "mmlu_uq_other")
MEANS = ("acc", "nll", "brier_score", "predictive_entropy", "expected_entropy", "mutual_information")


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=tasks_folder(), include_defaults=False)


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", PROJECT / "tasks" / "mmlu_uq" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------ rows: our own, or the real ones


def own_rows(path, name):
    """Six rows in the form of a benchmark, the text made up here; answers go round the choices."""
    rows = []
    for i in range(6):
        words = [f"{word} {i}" for word in ("ash", "birch", "cedar wood", "dogwood", "elm")]
        if path == "allenai/ai2_arc":
            labels = list("ABCD") if i % 2 else list("1234")
            row = {"choices": {"text": words[:4], "label": labels}, "answerKey": labels[i % 4]}
        elif path == "tau/commonsense_qa":
            row = {"choices": {"text": words, "label": list("ABCDE")}, "answerKey": "ABCDE"[i % 5]}
        elif path == "cais/mmlu":
            row = {"choices": words[:4], "answer": i % 4, "subject": ""}
        else:
            assert path == "Rowan/hellaswag"
            row = {"activity_label": "Planting", "ctx_a": f"A man digs hole {i}.", "ctx_b": "he"}
            row |= {"endings": [f"plants the {word}." for word in words[:4]], "label": str(i % 4)}
        rows.append({"question": f" Which tree is number {i} of {name}?", **row})
    return datasets.Dataset.from_list(rows)


@pytest.fixture(params=["own rows", pytest.param("real rows", marks=needs_hub)])
def rows(request, monkeypatch):
    """Where the data of every task come from during a test."""
    if request.param == "real rows":
        monkeypatch.chdir(HUB)
        return request.param

    def load_dataset(path, name=None, split=None, **kwargs):
        splits = {key: own_rows(path, name) for key in ("train", "dev", "validation", "test")}
        return [splits[key] for key in split] if split else datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return request.param


def load(manager, name):
    return manager.load([name])["tasks"][name]


def requests(task, num_fewshot, limit=20):
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


# -------------------------------------------------------------------------------------- what is listed


def test_every_task_and_group_is_listed_as_multiple_choice(manager):
    subjects = {name for name in manager.all_subtasks if name.startswith("mmlu_uq_")}
    assert len(subjects) == 57
    assert set(manager.all_subtasks) == {*STOCK_YAML, *PAPER, *LETTERS, *QUICKSTART} | subjects
    assert set(manager.all_groups) == {*MMLU_GROUPS, "bayesian_lora"}
    lines = manager.list_all_tasks(list_groups=False, list_tags=False).splitlines()
    for name in manager.all_subtasks:
        (line,) = [line for line in lines if line.startswith((f"|{name} ", f"|{name}|"))]
        assert "multiple_choice" in line


def test_every_task_and_its_splits_are_in_the_docs(manager):
    """docs/tasks.md has a row for each, with the splits of its YAML; a subject of MMLU is in its group's row."""
    page = (PROJECT / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line[:2] == "| "
    ]
    row_of = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert set(manager.all_groups) <= set(row_of)
    for name in manager.all_subtasks:
        if name.startswith("mmlu_uq_"):
            continue
        entry = load_yaml(manager.task_index[name].yaml_path, resolve_func=False)
        stock = load_yaml(STOCK_TASKS / entry["stock"], resolve_func=False) if "stock" in entry else {}
        config = {**stock, **entry}
        *_, training, validation, test = row_of[name]
        for cell, key in ((training, "training_split"), (validation, "validation_split")):
            assert (cell != "–") == bool(config.get(key)), (name, key)
        assert test == f"`{config.get('test_split') or config['validation_split']}`" or name in LETTERS
        assert name not in LETTERS or test == "`validation`"


def test_no_name_hides_a_stock_task(manager):
    declared = re.compile(r"""^["']?(?:task|group|tag)["']?:\s*["']?([\w-]+)""", re.MULTILINE)
    stock = {
        name
        for path in STOCK_TASKS.glob("**/*.yaml")
        for name in declared.findall(path.read_text(encoding="utf-8"))
    }
    assert {"arc_easy", "mmlu_anatomy", "mmlu_stem"} <= stock
    assert stock.isdisjoint(manager.task_index)


def test_mmlu_files_are_what_the_script_writes_from_the_installed_lm_eval(generate):
    folder = PROJECT / "tasks" / "mmlu_uq"
    assert {path.name: path.read_text() for path in folder.glob("*.yaml")} == generate.files()


def test_mmlu_groups_have_the_stock_subjects(manager):
    stock = TaskManager(include_path=STOCK_TASKS / "mmlu" / "default", include_defaults=False)
    for category in ("stem", "humanities", "social_sciences", "other"):
        theirs = stock.task_index[f"mmlu_{category}_tasks"].tags
        ours = manager.task_index[f"mmlu_uq_{category}_tasks"].tags
        assert ours == {name.replace("mmlu_", "mmlu_uq_") for name in theirs}


@pytest.mark.parametrize("group", [*MMLU_GROUPS, "bayesian_lora"])
def test_groups_list_only_metrics_whose_mean_over_tasks_is_right(group):
    folder = "paper" if group == "bayesian_lora" else "mmlu_uq"
    config = load_yaml(tasks_folder() / folder / f"_{group}.yaml")
    assert config["aggregate_metric_list"] == [{"metric": name, "weight_by_size": True} for name in MEANS]


# ------------------------------------------------------------------------------ the same as stock tasks


@pytest.mark.parametrize("name", STOCK_YAML)
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_requests_are_the_stock_tasks(manager, rows, name, num_fewshot):
    ours = load(manager, name)
    stock = ConfigurableTask(config=load_yaml(STOCK_TASKS / STOCK_YAML[name]))
    assert isinstance(ours, UncertaintyTask)
    assert requests(ours, num_fewshot) == requests(stock, num_fewshot)


@pytest.mark.parametrize("name", STOCK_YAML)
def test_gold_and_accuracies_are_the_stock_tasks(manager, rows, name):
    ours = load(manager, name)
    stock = ConfigurableTask(config=load_yaml(STOCK_TASKS / STOCK_YAML[name]))
    metrics = (
        {"acc"} if stock.config.dataset_path in ("cais/mmlu", "tau/commonsense_qa") else {"acc", "acc_norm"}
    )
    for index, doc in enumerate(list(stock.eval_docs)[:20]):
        assert ours.doc_to_target(doc) == stock.doc_to_target(doc)
        # long choices score worse, and the best score wanders: acc and acc_norm disagree, and both err
        results = [
            (-0.5 * len(choice) - 3.0 * ((index + place) % 3), False)
            for place, choice in enumerate(stock.doc_to_choice(doc))
        ]
        theirs = stock.process_results(doc, results)
        assert metrics <= set(theirs)
        assert theirs.items() <= ours.process_results(doc, results).items()


def test_group_rows_carry_every_metric(manager, rows):
    class PrefersEarlyLetters(LM):
        def loglikelihood(self, instances, **kwargs):
            return [(-0.1 * (ord(instance.args[1][-1]) - ord("A")) - 1.0, False) for instance in instances]

        def loglikelihood_rolling(self, instances, **kwargs):
            raise NotImplementedError

        def generate_until(self, instances, **kwargs):
            raise NotImplementedError

    out = lm_eval.simple_evaluate(
        PrefersEarlyLetters(),
        tasks=["mmlu_uq_social_sciences"],
        task_manager=manager,
        limit=3,
        bootstrap_iters=0,
    )
    group = out["groups"]["mmlu_uq_social_sciences"]
    subjects = [out["results"][name] for name in out["group_subtasks"]["mmlu_uq_social_sciences"]]
    assert len(subjects) == 12
    for metric in MEANS:
        mean = sum(subject[f"{metric},none"] for subject in subjects) / 12
        assert group[f"{metric},none"] == pytest.approx(mean)
    for metric in ("ece", "rms_ce"):
        assert f"{metric},none" in group
    assert group["members,none"] == 1


# -------------------------------------------------------------------------------------- the paper's tasks


def test_paper_prompt_of_commonsense_qa(manager, rows):
    task = load(manager, "paper_commonsense_qa")
    assert task.has_training_docs()
    for doc in list(task.eval_docs)[:20]:
        options = "".join(
            f"({letter}) {text}\n" for letter, text in zip("abcde", doc["choices"]["text"], strict=True)
        )
        task.build_all_requests(limit=1, rank=0, world_size=1)
        assert task.doc_to_text(doc) == f"Q: {doc['question']}\nAnswer Choices:\n{options}A: ("
        assert task.doc_to_target(doc) == "ABCDE".index(doc["answerKey"])
    context = task.doc_to_text(next(iter(task.eval_docs)))
    assert [instance.args for instance in task.instances] == [(context, letter) for letter in "abcde"]


def test_paper_prompt_of_mmlu(manager, rows):
    task = load(manager, "paper_mmlu_social_sciences")
    for doc in list(task.eval_docs)[:20]:
        options = "".join(f"({letter}) {text}\n" for letter, text in zip("abcd", doc["choices"], strict=True))
        assert task.doc_to_text(doc) == f"Q: {doc['question']}\nAnswer Choices:\n{options}A: ("
        assert task.doc_to_target(doc) == doc["answer"]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    context = task.doc_to_text(next(iter(task.eval_docs)))
    assert [instance.args for instance in task.instances] == [(context, letter) for letter in "abcd"]


@pytest.mark.parametrize("category", ["stem", "social_sciences"])
def test_paper_mmlu_pools_each_subject_of_the_group_once(manager, category):
    config = load_yaml(tasks_folder() / "paper" / f"paper_mmlu_{category}.yaml", resolve_func=False)
    subjects = config["dataset_kwargs"]["subjects"]
    tagged = manager.task_index[f"mmlu_uq_{category}_tasks"].tags
    assert sorted(subjects) == sorted(name.removeprefix("mmlu_uq_") for name in tagged)


def test_paper_mmlu_trains_on_dev_and_validation(monkeypatch):
    def load_dataset(path, name, split):
        return [datasets.Dataset.from_list([{"question": f"{name} {key}"}]) for key in split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pooled = paper_data.mmlu(subjects=["anatomy", "virology"], version=1.0)
    assert list(pooled) == ["train", "test"]
    assert pooled["train"]["question"][:] == [
        "anatomy dev",
        "anatomy validation",
        "virology dev",
        "virology validation",
    ]
    assert pooled["test"].to_list() == [
        {"question": "anatomy test", "subject": "anatomy"},
        {"question": "virology test", "subject": "virology"},
    ]


@needs_hub
@pytest.mark.parametrize(("category", "train", "test"), [("stem", 430, 3153), ("social_sciences", 397, 3077)])
def test_paper_mmlu_sizes(manager, monkeypatch, category, train, test):
    monkeypatch.chdir(HUB)
    task = load(manager, f"paper_mmlu_{category}")
    assert (len(task.training_docs()), len(task.test_docs())) == (train, test)


@pytest.mark.parametrize("letters_hold", [0.6, 1.0])
def test_paper_tasks_report_the_class_other(manager, rows, letters_hold):
    task = load(manager, "paper_commonsense_qa")
    doc = next(iter(task.eval_docs))
    results = [(math.log(letters_hold / 5), False)] * 5
    metrics = task.process_results(doc, results)
    assert metrics["nll"] == pytest.approx(-math.log(letters_hold / 5))
    rest = 1 - letters_hold
    entropy = -letters_hold * math.log(letters_hold / 5) - (rest * math.log(rest) if rest else 0)
    assert metrics["predictive_entropy"] == pytest.approx(entropy)


# --------------------------------------------------------------------------------------- the quickstart


@pytest.mark.parametrize(("name", "size"), [("quickstart_countries", 112), ("quickstart_invented", 112)])
def test_quickstart_tasks_ask_in_cloze_style(manager, name, size):
    task = load(manager, name)
    assert len(task.eval_docs) == size
    assert task.has_training_docs() == (name == "quickstart_countries")
    doc = next(iter(task.eval_docs))
    expected = [(f"Question: {doc['question']}\nAnswer:", f" {choice}") for choice in doc["choices"]]
    assert requests(task, 0, limit=1) == expected
    assert set(task.process_results(doc, [(-1.0, False)] * 4)) >= {"acc", "acc_norm", "nll"}
    json.dumps(task.process_results(doc, [(-1.0, False)] * 4))
