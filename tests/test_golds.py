"""Which choices are right: those for which lm-eval itself counts an answer as right."""

import numpy as np
import pytest
from train_fixtures import make_task, quick_tasks  # noqa: F401

from lm_eval_lora_ensemble.harness.golds import gold_indices
from lm_eval_lora_ensemble.train import examples

# the context varies with the choice, as winogrande's does: doc_to_text then holds the gold
VARYING = {
    "doc_to_text": "gold",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{', said the ' ~ question}}",
}
FORMS = {
    "number": {},
    "written_number": {"doc_to_target": "{{gold}}"},
    "name": {"doc_to_target": "{{choices[gold]}}"},
    "several": {"doc_to_target": [0, 2]},
    "written_list": {"doc_to_target": "{{[gold, (gold + 1) % choices|length]}}"},
    "varying_context": VARYING,
    "some_beyond": {"doc_to_target": "{{gold + 9 * (gold == 2)}}"},
    "some_negative": {"doc_to_target": "{{gold - 9 * (gold == 1)}}"},
    "some_unknown_name": {"doc_to_target": "{{choices[gold] if gold else 'violet'}}"},
}


@pytest.mark.parametrize("form", FORMS)
def test_golds_are_the_choices_that_lm_eval_counts_as_right(form, tmp_path):
    make_task(tmp_path, form, **FORMS[form])
    task = examples.load_tasks([form], str(tmp_path))[form]
    refused = 0
    for doc in task.training_docs():
        choices = task.doc_to_choice(doc)
        ranked_first = [[(float(i == j), False) for j in range(len(choices))] for i in range(len(choices))]
        right = [i for i, lls in enumerate(ranked_first) if task.process_results(doc, lls)["acc"] == 1.0]
        try:
            golds = gold_indices(task, doc, choices)
        except LookupError as error:
            assert f"is none of its {len(choices)} choices" in str(error)
            golds, refused = (), refused + 1
        assert sorted(golds) == right
    assert bool(refused) == form.startswith("some_")


class Stock:
    """A task that says one gold, whatever kind of object a data set's column makes of it."""

    multiple_input = 0

    def __init__(self, gold):
        self.gold = gold

    def doc_to_target(self, doc):
        return self.gold


@pytest.mark.parametrize(
    ("gold", "indices"),
    [(np.int64(1), (1,)), (1.0, (1,)), (True, (1,)), ((0, 1), (0, 1)), ([np.int64(1)], (1,))],
)
def test_numbers_of_any_type_are_indices(gold, indices):
    found = gold_indices(Stock(gold), {}, ["a", "b"])
    assert found == indices and all(type(index) is int for index in found)


@pytest.mark.parametrize("gold", [None, [], 2, -1, 0.5, float("nan"), "c", [2, 3], ["a"]])
def test_what_is_no_choice_is_refused_by_name(gold):
    with pytest.raises(LookupError, match=r"is none of its 2 choices") as caught:
        gold_indices(Stock(gold), {}, ["a", "b"])
    assert repr(gold) in str(caught.value)
