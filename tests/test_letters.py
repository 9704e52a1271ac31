"""The tasks asked for by letter: their rows, prompts, answers, splits and whole evaluations."""

from __future__ import annotations

from collections import Counter

import datasets
import lm_eval
import numpy as np
import pytest
from conftest import HUB, needs_hub, random_adapters, tiny_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from test_tasks import BAYESIAN_LORA, LETTERS, MEANS, STOCK_TASKS

from lm_eval_lora_ensemble.disk import tasks_folder
from lm_eval_lora_ensemble.harness import rendering
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.harness.tasks import UncertaintyTask
from lm_eval_lora_ensemble.tasks.paper import letters
from lm_eval_lora_ensemble.train.recipe import Recipe

STOCK_YAML = {
    "paper_arc_easy": "arc/arc_easy.yaml",
    "paper_arc_challenge": "arc/arc_challenge.yaml",
    "paper_hellaswag": "hellaswag/hellaswag.yaml",
    "paper_openbookqa": "openbookqa/openbookqa.yaml",
    "paper_winogrande_s": "winogrande/default.yaml",
    "paper_winogrande_m": "winogrande/default.yaml",
    "paper_boolq": "super_glue/boolq/default.yaml",
}
REAL = ("paper_arc_easy", "paper_arc_challenge", "paper_hellaswag")


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=tasks_folder(), include_defaults=False)


def load(manager, name):
    return manager.load([name])["tasks"][name]


# ------------------------------------------------------------------------------- rows in the data sets' columns

COUNTS = {  # test rows: sets of different sizes, so that pooled and macro differ
    "ARC-Easy": 12,
    "ARC-Challenge": 9,
    "main": 8,
    "winogrande_s": 7,
    "winogrande_m": 7,
    "winogrande_xl": 7,
    "boolq": 5,
}


def one_row(dataset, config, split, i):
    """A made-up row; its answer goes round the choices, ARC has three to five of them."""
    words = [f"{word} {i}" for word in ("ash", "birch", "cedar wood", "dogwood", "elm")]
    question = f"Which {split} tree is number {i} of {config}?"
    if dataset == "allenai/ai2_arc":
        words = words[: 3 + i % 3]
        labels = list("ABCDE" if i % 2 else "12345")[: len(words)]
        choices = {"text": words, "label": labels}
        return {"id": f"{i}", "question": question, "choices": choices, "answerKey": labels[i % len(labels)]}
    if dataset == "allenai/openbookqa":
        choices = {"text": words[:4], "label": list("ABCD")}
        key = " " * (i % 2) + "ABCD"[i % 4]  # lm-eval strips it
        return {"id": f"{i}", "question_stem": question, "choices": choices, "answerKey": key}
    if dataset == "allenai/winogrande":
        sentence = f"In {split} the ash hid the elm since the _ was number {i}."
        return {"sentence": sentence, "option1": "ash", "option2": "elm", "answer": "12"[i % 2]}
    if dataset == "aps/super_glue":
        passage = f"The {split} tree {i} grows in a wood."
        return {"question": f"is tree {i} in a wood", "passage": passage, "idx": i, "label": i % 2}
    assert dataset == "Rowan/hellaswag"
    row = {"ind": i, "activity_label": "Planting", "ctx_a": f"A {split} man digs hole {i}.", "ctx_b": "he"}
    return row | {"endings": [f"[step] plants the {word}." for word in words[:4]], "label": str(i % 4)}


def all_rows(dataset, config, split, count=None):
    count = count or (400 if split == "train" else COUNTS.get(config, 6))
    return [one_row(dataset, config, split, i) for i in range(count)]


@pytest.fixture
def own_rows(monkeypatch):
    def load_dataset(path, name=None, split=None, **kwargs):
        rows = {
            s: datasets.Dataset.from_list(all_rows(path, name, s)) for s in ("train", "validation", "test")
        }
        return [rows[s] for s in split] if split else datasets.DatasetDict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture
def real_rows(monkeypatch):
    monkeypatch.chdir(HUB)


def stock_gold(stock, doc):
    return stock.doc_to_text(doc) if stock.multiple_input else int(stock.doc_to_target(doc))


# ---------------------------------------------------------------------------------------- prompts and answers

ARC = {
    "question": "Which is alive?",
    "choices": {"text": ["rock", "sand", "moss"], "label": ["1", "2", "3"]},
    "answerKey": "3",
}
FIVE = {"text": ["a fly", "an ox", "a rat", "an eel", "a bee"], "label": list("ABCDE")}
STEM = "A plant makes sugar from"
WINO = {"sentence": "The cup did not fit the box as the _ was wide.", "option1": "cup", "option2": "box"}
HELLA = {
    "activity_label": "Baking",
    "ctx_a": "A man sifts flour [substeps] twice.",
    "ctx_b": "he",
    "label": "2",
}
ENDINGS = ["[step] eats it.", "flies off.", "adds milk [title] and eggs.", "sleeps."]
PASSAGE = {"passage": "Moss grows on stones.", "question": "does moss grow on stones", "idx": 4}
FORMS = {
    "three choices, digits": (
        letters.arc,
        ARC,
        "Q: Which is alive?\nAnswer Choices:\n(a) rock\n(b) sand\n(c) moss\nA: (",
        "abc",
        "c",
    ),
    "five choices, letters": (
        letters.arc,
        {"question": "Which swims?", "choices": FIVE, "answerKey": "D"},
        "Q: Which swims?\nAnswer Choices:\n(a) a fly\n(b) an ox\n(c) a rat\n(d) an eel\n(e) a bee\nA: (",
        "abcde",
        "d",
    ),
    "openbookqa": (
        letters.openbookqa,
        {"question_stem": STEM, "choices": {"text": ["air", "lead"], "label": ["A", "B"]}, "answerKey": " A"},
        "Q: A plant makes sugar from\nAnswer Choices:\n(a) air\n(b) lead\nA: (",
        "ab",
        "a",
    ),
    "winogrande": (
        letters.winogrande,
        {**WINO, "answer": "1"},
        "Q: The cup did not fit the box as the _ was wide.\nAnswer Choices:\n(a) cup\n(b) box\nA: (",
        "ab",
        "a",
    ),
    "winogrande, the other": (
        letters.winogrande,
        {**WINO, "answer": "2"},
        "Q: The cup did not fit the box as the _ was wide.\nAnswer Choices:\n(a) cup\n(b) box\nA: (",
        "ab",
        "b",
    ),
    "boolq, false": (
        letters.boolq,
        {**PASSAGE, "label": 0},
        "Q: Moss grows on stones.\ndoes moss grow on stones?\nAnswer Choices:\n(a) no\n(b) yes\nA: (",
        "ab",
        "a",
    ),
    "boolq, true": (
        letters.boolq,
        {**PASSAGE, "label": 1},
        "Q: Moss grows on stones.\ndoes moss grow on stones?\nAnswer Choices:\n(a) no\n(b) yes\nA: (",
        "ab",
        "b",
    ),
    "hellaswag": (
        letters.hellaswag,
        {**HELLA, "endings": ENDINGS},
        "Q: Baking: A man sifts flour twice. He\nAnswer Choices:\n(a) eats it.\n(b) flies off.\n"
        "(c) adds milk. and eggs.\n(d) sleeps.\nA: (",
        "abcd",
        "c",
    ),
}
NAME_OF = {
    letters.arc: "paper_arc_easy",
    letters.openbookqa: "paper_openbookqa",
    letters.winogrande: "paper_winogrande_m",
    letters.boolq: "paper_boolq",
    letters.hellaswag: "paper_hellaswag",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_asked_in_the_papers_form(manager, monkeypatch, form):
    of_set, row, prompt, choices, gold = FORMS[form]
    rows = datasets.Dataset.from_list([row])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: [rows for _ in split])
    task = load(manager, NAME_OF[of_set])
    task.build_all_requests(limit=1, rank=0, world_size=1)
    assert [instance.args for instance in task.instances] == [(prompt, letter) for letter in choices]
    assert choices[task.doc_to_target(task.test_docs()[0])] == gold


@pytest.mark.parametrize("name", LETTERS)
def test_tasks_read_what_the_stock_tasks_read(name):
    """Where the data come from, and which split the stock task evaluates where it has no test labels."""
    ours = load_yaml(tasks_folder() / "paper" / f"{name}.yaml", resolve_func=False)["dataset_kwargs"]
    stock = load_yaml(STOCK_TASKS / STOCK_YAML[name], resolve_func=False)
    assert ours["dataset"] == stock["dataset_path"]
    if "winogrande" in name:
        assert stock["dataset_name"] == "winogrande_xl"
        assert ours["dataset_config"] == f"winogrande_{name[-1]}"
    else:
        assert ours.get("dataset_config") == stock.get("dataset_name")


def check_against_stock(manager, name):
    """Ours and the stock task see the same documents and answers: the columns are the data set's own."""
    ours, stock = load(manager, name), ConfigurableTask(config=load_yaml(STOCK_TASKS / STOCK_YAML[name]))
    assert isinstance(ours, UncertaintyTask)
    theirs = list(stock.validation_docs())
    assert len(ours.test_docs()) == len(theirs)
    for doc, raw in list(zip(ours.test_docs(), theirs, strict=True))[:200]:
        assert ours.doc_to_target(doc) == stock_gold(stock, raw)
        if not stock.multiple_input:
            assert [c.strip() for c in stock.doc_to_choice(raw)] == doc["choices"]
        assert ours.doc_to_choice(doc) == list("abcde")[: len(doc["choices"])]
    return ours


@pytest.mark.parametrize("name", LETTERS)
def test_documents_and_answers_are_the_stock_tasks(manager, own_rows, name):
    ours = check_against_stock(manager, name)
    sizes = Counter(len(doc["choices"]) for doc in ours.test_docs())
    assert set(sizes) == ({3, 4, 5} if "arc" in name else {2} if name[6:11] in ("winog", "boolq") else {4})


@needs_hub
@pytest.mark.parametrize("name", REAL)
def test_real_documents_and_answers_are_the_stock_tasks(manager, real_rows, name):
    check_against_stock(manager, name)


# ------------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("name", LETTERS)
def test_a_tenth_of_train_is_held_out(manager, own_rows, name):
    task = load(manager, name)
    train, held_out = list(task.training_docs()), list(task.validation_docs())
    assert len(train) + len(held_out) == 400
    assert 20 <= len(held_out) <= 60
    texts = {
        split: {(doc["question"], *doc["choices"]) for doc in docs} for split, docs in splits(task).items()
    }
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 400 + len(task.test_docs())
    again = load(manager, name)
    assert list(again.training_docs()) == train
    assert list(again.validation_docs()) == held_out


def splits(task):
    return {"train": task.training_docs(), "validation": task.validation_docs(), "test": task.test_docs()}


def test_a_document_decides_by_its_own_text(manager, own_rows, monkeypatch):
    """Fewer rows, other ids or a repeated row move no document; so WinoGrande-S and -M hold out the same of theirs."""
    held_out = list(load(manager, "paper_openbookqa").validation_docs())
    rows = all_rows("allenai/openbookqa", "main", "train")[100:]
    rows = [{**row, "id": "x"} for row in [*rows, *rows[:50]]]
    some = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: [some for _ in split])
    fewer = load(manager, "paper_openbookqa")
    assert all(doc in held_out for doc in fewer.validation_docs())
    assert not any(doc in held_out for doc in fewer.training_docs())
    assert 0 < len(fewer.validation_docs()) < len(held_out) + 50


HELD_OUT = [4, 25, 29, 31, 33, 35, 38, 42, 44, 63, 77, 89, 98]


def test_which_documents_are_held_out_stays():
    """A change here makes runs incomparable: raise the tasks' version with it."""
    rows = [{"question": f"Größe {i}?", "choices": ["ja", "nein"], "answer": i % 2} for i in range(100)]
    assert [i for i, row in enumerate(rows) if letters.is_held_out(row)] == HELD_OUT
    other_answers = [{**row, "answer": 1 - row["answer"]} for row in rows]
    assert [i for i, row in enumerate(other_answers) if letters.is_held_out(row)] == HELD_OUT


@needs_hub
@pytest.mark.parametrize(
    ("name", "train", "validation", "test"),
    [("paper_arc_easy", 2021, 230, 570), ("paper_arc_challenge", 1016, 103, 299)],
)
def test_real_splits(manager, real_rows, name, train, validation, test):
    task = load(manager, name)
    assert {split: len(docs) for split, docs in splits(task).items()} == {
        "train": train,
        "validation": validation,
        "test": test,
    }
    texts = [
        {(d["question"], *d["choices"]) for d in docs}
        for docs in (task.training_docs(), task.validation_docs())
    ]
    assert texts[0].isdisjoint(texts[1])


@pytest.mark.parametrize("name", LETTERS)
def test_members_can_train_on_them(own_rows, monkeypatch, name):
    monkeypatch.setattr(
        rendering, "_task_manager", lambda path: TaskManager(include_path=path, include_defaults=False)
    )
    task = rendering.load_tasks([name], str(tasks_folder()))[name]
    assert task.has_training_docs()
    assert task.has_validation_docs()


def test_the_recipe_trains_on_any_of_the_six(manager):
    recipe = Recipe.load("mistral7b_bayesian_lora")
    assert recipe.task[0] in BAYESIAN_LORA
    assert (recipe.rank, recipe.alpha, recipe.learning_rate) == (8, 16, 1e-4)
    assert (recipe.batch_size * recipe.gradient_accumulation, recipe.max_steps) == (4, 5000)
    assert recipe.target_modules == ("q_proj", "v_proj", "lm_head")
    smallest = 640 * 0.9  # WinoGrande-S
    assert recipe.epochs * smallest / recipe.batch_size > recipe.max_steps
    group = load_yaml(tasks_folder() / "paper" / "_bayesian_lora.yaml")
    assert tuple(group["task"]) == BAYESIAN_LORA


# ------------------------------------------------------------------------------------------- whole evaluations


@pytest.fixture(scope="module")
def ensemble_lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    base = tiny_model(folder / "base", "llama")
    return LoraEnsembleLM(
        adapters=str(random_adapters(base, folder / "ensemble", 3, spread=0.1)), device="cpu"
    )


def predicted(sample):
    """The mixture over letters and "other" of a logged document, and its gold: from the definitions."""
    letters_p = np.exp(np.array(sample["members"]))
    assert sample["other_class"] is True
    return np.hstack([letters_p, 1 - letters_p.sum(-1, keepdims=True)]), sample["golds"][0]


def ece(samples):
    """15 right-closed bins; nothing of ours."""
    pairs = []
    for sample in samples:
        p, gold = predicted(sample)
        mixture = p.mean(0)
        pairs.append((mixture.max(), float(mixture.argmax() == gold)))
    confidence, correct = np.array(pairs).T
    bins = np.ceil(confidence * 15).astype(int)
    gaps = [
        abs(confidence[bins == b].mean() - correct[bins == b].mean()) * (bins == b).sum() for b in set(bins)
    ]
    return sum(gaps) / len(bins)


def entropy(p):
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def test_a_whole_evaluation(manager, own_rows, ensemble_lm):
    out = lm_eval.simple_evaluate(
        ensemble_lm, tasks=["bayesian_lora", "paper_hellaswag"], task_manager=manager, bootstrap_iters=0
    )
    assert set(out["samples"]) == set(LETTERS)
    for name in LETTERS:
        row, samples = out["results"][name], out["samples"][name]
        predictions = [predicted(sample) for sample in samples]
        nll = [-np.log(p.mean(0)[gold]) for p, gold in predictions]
        total = [entropy(p.mean(0)) for p, _ in predictions]
        own = [entropy(p).mean() for p, _ in predictions]
        assert row["nll,none"] == pytest.approx(np.mean(nll))
        assert row["predictive_entropy,none"] == pytest.approx(np.mean(total))
        assert row["mutual_information,none"] == pytest.approx(np.mean(np.subtract(total, own)), abs=1e-9)
        assert row["mutual_information,none"] > 1e-6
        assert row["ece,none"] == pytest.approx(ece(samples))
        assert row["members,none"] == 3

    group = out["groups"]["bayesian_lora"]
    tasks = [out["results"][name] for name in BAYESIAN_LORA]
    sizes = [len(out["samples"][name]) for name in BAYESIAN_LORA]
    assert len(set(sizes)) > 2
    for metric in MEANS:
        assert group[f"{metric},none"] == pytest.approx(
            np.average([task[f"{metric},none"] for task in tasks], weights=sizes)
        )
    pooled = [sample for name in BAYESIAN_LORA for sample in out["samples"][name]]
    assert group["ece,none"] == pytest.approx(ece(pooled))
    assert group["ece_macro,none"] == pytest.approx(np.mean([task["ece,none"] for task in tasks]))
    assert group["ece_macro,none"] != pytest.approx(group["ece,none"])
    assert group["members,none"] == 3
