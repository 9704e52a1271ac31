"""Documents: what a member trains on is what lm-eval will score."""

import pytest
from lm_eval.api.instance import Instance
from train_fixtures import make_recipe, make_task, one_thread, quick_tasks  # noqa: F401

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train import base, examples
from lm_eval_lora_ensemble.train.scale import ChoiceScale


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    recipe = make_recipe(folder)
    make_task(folder / "tasks", "varying_context", **VARYING)
    make_task(folder / "tasks", "empty_context", doc_to_text="", target_delimiter="")
    make_task(folder / "tasks", "by_name", doc_to_target="{{choices[gold]}}")
    make_task(folder / "tasks", "several_golds", doc_to_target=[0, 2])
    make_task(folder / "tasks", "no_training", train=0)
    make_task(folder / "tasks", "generating", output_type="generate_until", doc_to_choice=None)
    make_task(folder / "tasks", "wrong_gold", doc_to_target="{{gold + 9 * (gold == 2)}}")
    make_task(
        folder / "tasks", "few_shots", train=4, num_fewshot=3, fewshot_split="train", description="Answer."
    )
    return folder, base.load(recipe, base.pick_device("cpu"))


# The blank is filled with each choice; what follows is the same for all: the form of winogrande.
VARYING = {
    "doc_to_text": "gold",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{', said the ' ~ question}}",
    "target_delimiter": "",
}


def load(folder, **changes):
    path, loaded = folder
    return examples.load(make_recipe(path, **changes), loaded)


@pytest.mark.parametrize("task", ["tiny_colours", "varying_context", "empty_context", "by_name"])
def test_tokens_and_gold_are_those_of_the_evaluation(folder, task, monkeypatch):
    path, loaded = folder
    data = load(folder, task=task)
    assert len(data.training) == 44
    assert len(data.validation) == 12
    stock = examples.load_tasks([task], str(path / "tasks"))[task]
    seen = []
    monkeypatch.setattr(
        loaded.encoder, "_loglikelihood_tokens", lambda requests, **_: seen.extend(requests) or []
    )
    for doc, example in zip(stock.training_docs(), data.training, strict=True):
        context = stock.fewshot_context(doc, 0)
        requests = stock.construct_requests(doc=doc, ctx=context, metadata=(task, 0, 1))
        assert all(isinstance(request, Instance) for request in requests)
        seen.clear()
        loaded.encoder.loglikelihood(requests, disable_tqdm=True)
        assert [(tuple(c), tuple(t)) for _, c, t in seen] == [
            (choice.context, choice.continuation) for choice in example.choices
        ]
        # lm-eval itself finds the gold choice right when it scores highest
        lls = [(0.0 if i in example.gold else -9.0, False) for i in range(len(example.choices))]
        assert stock.process_results(doc, lls)["acc"] == 1.0


def test_contexts_vary_where_the_task_varies_them(folder):
    example = load(folder, task="varying_context").training[1]
    assert len({choice.context for choice in example.choices}) == len(example.choices)
    assert len({choice.continuation for choice in example.choices}) == 1


def test_several_right_answers_are_kept(folder):
    assert load(folder, task="several_golds").training[0].gold == (0, 2)


def test_a_document_is_never_its_own_shot(folder):
    path, loaded = folder
    data = load(folder, task="few_shots")
    docs = list(examples.load_tasks(["few_shots"], str(path / "tasks"))["few_shots"].training_docs())
    for example, doc in zip(data.training, docs, strict=True):
        prompt = loaded.encoder.tokenizer.decode(example.choices[0].context)
        assert prompt.count(f"Question: {doc['question']}\n") == 1
        assert prompt.count("Question:") == 4


def test_limits_take_the_first_or_a_drawn_subset(folder):
    first = [e.doc_id for e in load(folder, train_limit=5).training]
    drawn = [e.doc_id for e in load(folder, train_limit=5, subset_seed=3).training]
    assert first == [0, 1, 2, 3, 4]
    assert drawn == sorted(set(drawn))
    assert drawn != first
    assert drawn == [e.doc_id for e in load(folder, train_limit=5, subset_seed=3).training]
    assert load(folder, validation_limit=0).validation == []


def test_lengths_are_those_that_acc_norm_divides_by(folder):
    path, _ = folder
    docs = list(examples.load_tasks(["tiny_colours"], str(path / "tasks"))["tiny_colours"].training_docs())
    for example, doc in zip(load(folder).training, docs, strict=True):
        assert [choice.characters for choice in example.choices] == [len(text) for text in doc["choices"]]
    for example in load(folder, task="varying_context").training:
        assert [choice.characters for choice in example.choices] == [None] * len(example.choices)


def test_what_stands_before_the_answer_is_part_of_the_prompt(folder):
    """lm-eval's ``gen_prefix``, which its evaluation puts behind the question."""
    path, loaded = folder
    make_task(path / "tasks", "prefixed", gen_prefix="The answer is")
    context = load(folder, task="prefixed", train_limit=1).training[0].choices[0].context
    assert loaded.encoder.tokenizer.decode(context).endswith("The answer is")


def test_scores_by_characters_need_characters(folder):
    path, _ = folder
    choices = "{{choices[:2] + ['' if gold else 'white']}}"
    make_task(path / "tasks", "one_empty", doc_to_choice=choices, doc_to_target="{{0}}")
    first, second = load(folder, task="one_empty", train_limit=2).training
    assert ChoiceScale("chars").divisors(first)[2] == 5
    assert ChoiceScale("sum", 2.0).divisors(second) == (2.0, 2.0, 2.0)
    with pytest.raises(
        EnsembleError, match="choice 2 of document 1 of one_empty is empty; use choice_scores=s"
    ):
        ChoiceScale("chars").divisors(second)


def test_tasks_are_mixed(folder):
    data = load(folder, task=["tiny_colours", "by_name"], train_limit=3)
    assert [e.task for e in data.training] == ["tiny_colours"] * 3 + ["by_name"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "tiny_colour"}, "lm-eval knows no task 'tiny_colour'; did you mean 'tiny_colours'?"),
        ({"task": "no_training"}, "task 'no_training' has no training split"),
        ({"task": "generating"}, "task 'generating' is generate_until"),
        (
            {"task": "wrong_gold"},
            "document 2 of wrong_gold has no right answer: the gold 11 is none of its 5 choices",
        ),
    ],
)
def test_unfit_tasks_are_refused(folder, changes, message):
    with pytest.raises(EnsembleError, match=message.replace("?", r"\?")):
        load(folder, **changes)


def test_early_stopping_needs_a_validation_split(folder):
    make_task(folder[0] / "tasks", "no_validation", validation=0)
    with pytest.raises(
        EnsembleError, match="early_stopping needs a validation split and no_validation has none"
    ):
        load(folder, task="no_validation", early_stopping=1)


def test_epochs_chosen_on_the_documents_that_are_judged_are_warned_of(folder, caplog):
    load(folder, task="tiny_colours")
    assert "early_stopping" not in caplog.text
    load(folder, task="tiny_colours", early_stopping=1)  # it has no test split
    assert "what lm-eval evaluates of tiny_colours: its results will be too good" in caplog.text
    caplog.clear()
    make_task(folder[0] / "tasks", "with_test", test=4)
    load(folder, task="with_test", early_stopping=1)
    assert "early_stopping" not in caplog.text


def test_long_documents_are_refused_with_their_number(folder, monkeypatch):
    _path, loaded = folder
    monkeypatch.setattr(loaded, "max_length", 14)
    with pytest.raises(
        EnsembleError, match=r"\d+ of 44 documents of tiny_colours \(training\) are longer than"
    ):
        load(folder)


def test_left_truncation_never_cuts_an_answer(folder, monkeypatch):
    _path, loaded = folder
    whole = load(folder).training
    monkeypatch.setattr(loaded, "max_length", 14)
    cut = load(folder, truncate="left").training
    assert whole != cut
    for before, after in zip(whole, cut, strict=True):
        for long, short in zip(before.choices, after.choices, strict=True):
            assert short.continuation == long.continuation
            assert short.context == long.context[-len(short.context) :]
            assert len(short.context) + len(short.continuation) - 1 <= 14
    monkeypatch.setattr(loaded, "max_length", 1)
    with pytest.raises(EnsembleError, match=r"an answer of tiny_colours \(training\) has \d tokens"):
        load(folder, truncate="left")
