"""Rows, masks and order: the same numbers as one row a choice, every document once, nobody's order another's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from train_fixtures import make_model, make_recipe, make_task, one_thread, quick_tasks  # noqa: F401

from lm_eval_lora_ensemble.train import base, examples
from lm_eval_lora_ensemble.train.examples import Choice, Example
from lm_eval_lora_ensemble.train.layout import Layout
from lm_eval_lora_ensemble.train.objective import (
    ScoredHead,
    TokenLoglikelihoods,
    document_losses,
    loglikelihoods,
    squared_norm_of_product,
)
from lm_eval_lora_ensemble.train.order import Order
from lm_eval_lora_ensemble.train.scale import ChoiceScale
from lm_eval_lora_ensemble.train.tree import why_no_tree_rows

VARYING = {
    "doc_to_text": "gold",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{', said the ' ~ question}}",
    "target_delimiter": "",
}


@pytest.fixture(scope="module", params=["llama", "mistral"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_model(folder / "base", request.param, initializer_range=0.2)
    make_task(folder / "tasks")
    make_task(folder / "tasks", "varying_context", **VARYING)
    return folder, base.load(make_recipe(folder), base.pick_device("cpu"))


@pytest.mark.parametrize("task", ["tiny_colours", "varying_context"])
@pytest.mark.parametrize("use_tree", [False, True])
def test_loglikelihoods_equal_lm_evals(loaded, task, use_tree):
    folder, model = loaded
    data = examples.load(make_recipe(folder, task=task, train_limit=7), model).training
    layout = Layout(data, gold_only=False, use_tree=use_tree, dtype=torch.float32)
    batch = layout.batch([range(7)], max(layout.lengths()) + 3, torch.device("cpu"))
    with torch.no_grad():
        mine = loglikelihoods(ScoredHead(model.model).logits(batch), batch)[0]
    stock = examples.load_tasks([task], str(folder / "tasks"))[task]
    for d, doc in zip(range(7), stock.training_docs(), strict=False):
        requests: list[Instance] = stock.construct_requests(
            doc=doc, ctx=stock.fewshot_context(doc, 0), metadata=(task, d, 1)
        )
        theirs = [ll for ll, _ in model.encoder.loglikelihood(requests, disable_tqdm=True)]
        np.testing.assert_allclose(mine[d, : len(theirs)], theirs, atol=2e-5)
        assert batch.is_choice[0, d].sum() == len(theirs)


def document(choices: list[Choice]):
    layout = Layout(
        [Example("t", 0, tuple(choices), (0,))], gold_only=False, use_tree=True, dtype=torch.float32
    )
    return layout.documents[0]


def test_tree_rows_hold_every_position_once():
    context = (5, 6, 7, 8)
    laid_out = document([Choice(context, (1, 2)), Choice(context, (3,)), Choice(context, (1, 4, 9))])
    (row,) = laid_out.rows
    # an answer's last token is predicted, not read, and the second 1 is the first
    assert row.tokens.tolist() == [5, 6, 7, 8, 1, 4]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert row.end.tolist() == [6, 6, 6, 6, 6, 6]
    assert laid_out.targets == (
        ((0, 3, 1), (0, 4, 2)),
        ((0, 3, 3),),
        ((0, 3, 1), (0, 4, 4), (0, 5, 9)),
    )


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=5),
            st.lists(st.integers(0, 3), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_target_of_a_tree_sees_its_own_sequence(pairs):
    choices = [Choice(tuple(context), tuple(continuation)) for context, continuation in pairs]
    laid_out = document(choices)
    (row,) = laid_out.rows
    for c, choice in enumerate(choices):
        sequence = choice.context + choice.continuation
        for i, (_, place, token) in enumerate(laid_out.targets[c]):
            seen = [int(row.tokens[k]) for k in range(place + 1) if place < row.end[k]]
            length = len(choice.context) + i
            assert tuple(seen) == sequence[:length]
            assert row.positions[place] == length - 1
            assert token == sequence[length]


def test_a_row_is_a_function_of_its_document_alone():
    """Else a member trained in other company would see other rows."""
    one, other = (
        [Choice((1, 2), (3, 4)), Choice((1, 2), (3, 5))],
        [Choice((1, 2), (3, 9)), Choice((7,), (8,))],
    )
    together = Layout(
        [Example("t", i, tuple(c), (0,)) for i, c in enumerate((one, other))],
        gold_only=False,
        use_tree=True,
        dtype=torch.float32,
    )
    for laid_out, choices in zip(together.documents, (one, other), strict=True):
        assert laid_out.targets == document(choices).targets
        np.testing.assert_array_equal(laid_out.rows[0].tokens, document(choices).rows[0].tokens)


def test_a_window_or_nothing_to_share_means_ordinary_rows(loaded):
    _, model = loaded
    choice = Choice(tuple(range(9)), (1, 2))
    data = [Example("t", 0, (choice, choice), (0,))]
    config = model.model.config
    window = getattr(config, "sliding_window", None)
    assert why_no_tree_rows(model, data) is None
    try:
        config.sliding_window = 5
        assert "beyond the sliding window of 5" in why_no_tree_rows(model, data)
    finally:
        config.sliding_window = window
    single = [Example("t", 0, (choice,), (0,))]
    assert why_no_tree_rows(model, single) == "the choices share no tokens"


def test_a_one_letter_answer_has_the_papers_loss(loaded):
    _folder, model = loaded
    letters = [Example("t", i, (Choice((3, 4, 5 + i), (7 + i,)),), (0,)) for i in range(4)]
    layout = Layout(letters, gold_only=True, use_tree=True, dtype=torch.float32)
    batch = layout.batch([range(4)], 8, torch.device("cpu"))
    lls = loglikelihoods(ScoredHead(model.model).logits(batch), batch)
    loss = document_losses(lls, batch, "answer").mean()
    prompts = torch.tensor([example.choices[0].context for example in letters])
    answers = torch.tensor([example.choices[0].continuation[0] for example in letters])
    expected = torch.nn.functional.cross_entropy(model.model(prompts).logits[:, -1], answers)
    torch.testing.assert_close(loss, expected)


def test_choices_loss_is_cross_entropy_over_the_choices(loaded):
    folder, model = loaded
    data = examples.load(make_recipe(folder, train_limit=6), model).training
    layout = Layout(data, gold_only=False, use_tree=True, dtype=torch.float32)
    batch = layout.batch([range(6)], max(layout.lengths()), torch.device("cpu"))
    lls = torch.randn(1, 6, layout.choices)
    losses = document_losses(lls, batch, "choices")
    for d, example in enumerate(data):
        valid = lls[0, d, : len(example.choices)]
        expected = torch.nn.functional.cross_entropy(valid, torch.tensor(example.gold[0]))
        torch.testing.assert_close(losses[0, d], expected)


def test_by_characters_the_loss_is_that_of_acc_norms_scores(loaded):
    folder, model = loaded
    task = examples.load_tasks(["tiny_colours"], str(folder / "tasks"))["tiny_colours"]
    data = examples.load(make_recipe(folder, train_limit=6), model).training
    scale = ChoiceScale("chars", 0.3)
    layout = Layout(data, gold_only=False, use_tree=True, dtype=torch.float32, scale=scale)
    batch = layout.batch([range(6)], max(layout.lengths()), torch.device("cpu"))
    lls = torch.randn(1, 6, layout.choices)
    losses = document_losses(lls, batch, "choices")
    for d, (example, doc) in enumerate(zip(data, task.training_docs(), strict=False)):
        lengths = torch.tensor([float(len(text)) for text in doc["choices"]])
        valid = lls[0, d, : len(lengths)] / (0.3 * lengths)
        expected = torch.nn.functional.cross_entropy(valid, torch.tensor(example.gold[0]))
        torch.testing.assert_close(losses[0, d], expected)


def test_token_loglikelihoods_are_log_softmax_with_its_gradient():
    """Rows and even single logits are used several times, as where choices share a prefix or a first token."""
    logits = torch.randn(5, 11, dtype=torch.float32, requires_grad=True)
    output, target = torch.tensor([[0, 0, 3], [4, 3, 0]]), torch.tensor([[2, 2, 10], [0, 5, 7]])
    factor = torch.randn(2, 3)
    mine = TokenLoglikelihoods.apply(logits, output, target)
    theirs = logits.log_softmax(-1)[output, target]
    torch.testing.assert_close(mine, theirs)
    gradients = [torch.autograd.grad((value * factor).sum(), logits)[0] for value in (mine, theirs)]
    torch.testing.assert_close(*gradients)


def test_squared_norm_of_product_is_frobenius():
    A, B = torch.randn(3, 4, 10, dtype=torch.float64), torch.randn(3, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(squared_norm_of_product(A, B), torch.linalg.matrix_norm(B @ A) ** 2)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=150),
    st.integers(1, 7),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_every_member_sees_every_document_once_an_epoch(lengths, batch_size, accumulation, shuffle, groups):
    order = Order(lengths, batch_size, accumulation, shuffle=shuffle, length_groups=groups)
    steps = order.epoch(3, [10, 11, 12])
    assert len(steps) == order.steps_per_epoch
    for member in range(3):
        seen = [d for step in steps for part in step for d in part.documents[member]]
        assert sorted(seen) == list(range(len(lengths)))
    for step in steps:
        for part in step:
            assert len({len(documents) for documents in part.documents}) == 1
            assert part.length >= max(lengths[d] for documents in part.documents for d in documents)
    alone = order.epoch(3, [11])
    assert [[(p.documents[0], p.length) for p in s] for s in alone] == [
        [(p.documents[1], p.length) for p in s] for s in steps
    ]


def test_orders_differ_between_members_and_epochs_and_groups_keep_padding_low():
    lengths = np.random.default_rng(0).integers(10, 100, 640)
    order = Order(lengths, 8)
    first, second = order.epoch(1, [0, 1]), order.epoch(2, [0, 1])
    assert [p.documents[0] for s in first for p in s] != [p.documents[1] for s in first for p in s]
    assert [p.documents[0] for s in first for p in s] != [p.documents[0] for s in second for p in s]
    padded = sum(p.length * 8 for s in first for p in s)
    assert padded < 1.2 * lengths.sum()
    unshuffled = Order(lengths, 8, shuffle=False).epoch(1, [0])
    assert unshuffled[0][0].documents[0] == list(range(8))
