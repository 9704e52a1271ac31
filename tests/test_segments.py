"""Segments against the mask they replace, on random trees: every pair once, in every window, by every kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny

from lm_eval_lora_ensemble.scoring import attention
from lm_eval_lora_ensemble.scoring.attention import (
    SegmentAttention,
    UnknownAttentionError,
    attend,
    attend_by_products,
    attention_in_place,
)
from lm_eval_lora_ensemble.scoring.flex import FlexAttention, interval_rule
from lm_eval_lora_ensemble.scoring.greedy import MixtureArgmax, settle
from lm_eval_lora_ensemble.scoring.head import Head, top_of
from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.rows import TreeRow, interval_mask, lay_out
from lm_eval_lora_ensemble.tree.segments import Sizes, plan_segments
from lm_eval_lora_ensemble.tree.trie import PrefixTrie

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=8)
sizes = st.builds(Sizes, *[st.integers(1, 15)] * 4)
windows = st.one_of(st.none(), st.integers(1, 22))


def row_of(found: list[list[int]]) -> tuple[TreeRow, int]:
    """Return a row and how many of its places may be kept from before: its first sequence but for the last token."""
    trie = PrefixTrie([TokenRequest(tuple(sequence), (0,)) for sequence in found])
    return lay_out(trie, 0, len(trie.sequences)), int(trie.lengths[0]) - 1


def allowed(row: TreeRow, window: int | None) -> np.ndarray:
    seen = interval_mask(torch.from_numpy(row.end)).numpy()
    return seen if window is None else seen & (row.positions[:, None] - row.positions < window)


@settings(max_examples=300, deadline=None)
@given(found=sequences, sizes=sizes, window=windows, share=st.floats(0, 1))
def test_every_pair_of_the_mask_is_in_one_piece(found, sizes, window, share):
    row, longest = row_of(found)
    prefix = int(share * longest)
    plan = plan_segments(row, prefix, window, sizes)
    counted = np.zeros((len(row), len(row)), dtype=int)
    for piece in (*plan.own, *plan.above):
        if piece.kind == "masked":
            inside = attention.visible(row, piece, window)
        elif piece.kind == "full":
            inside = np.ones((piece.last - piece.first, piece.n_keys), dtype=bool)
        else:
            assert piece.keys == ((piece.first, piece.last),)
            inside = np.tri(piece.last - piece.first, dtype=bool)
        counted[piece.first : piece.last, piece.places] += inside
    np.testing.assert_array_equal(counted[prefix:], allowed(row, window)[prefix:].astype(int))
    # in order, so that outputs can be written side by side
    assert [0, *(piece.last - prefix for piece in plan.own)] == [
        *(piece.first - prefix for piece in plan.own),
        len(row) - prefix,
    ]


@settings(max_examples=60, deadline=None)
@given(
    found=sequences, sizes=sizes, window=windows, share=st.floats(0, 1), key_heads=st.sampled_from([1, 2, 4])
)
def test_segments_attend_as_one_mask_does(found, sizes, window, share, key_heads):
    row, longest = row_of(found)
    prefix = int(share * longest)
    torch.manual_seed(0)
    query = torch.randn(1, 4, len(row) - prefix, 16)
    key, value = (torch.randn(1, key_heads, len(row), 16) for _ in range(2))
    mask = torch.from_numpy(allowed(row, window)[prefix:])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    for way in (
        SegmentAttention(row, prefix, sizes),
        FlexAttention(row, prefix, set(), compiled=False),
    ):
        output, weights = way(None, query, key, value, None, scaling=0.3, sliding_window=window)
        assert weights is None
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(found=sequences, window=windows)
def test_the_mask_function_of_an_accelerator_is_the_interval_rule(found, window):
    row, prefix = row_of(found)
    rule = interval_rule(row, prefix, window, torch.device("cpu"))
    queries, keys = torch.arange(len(row) - prefix)[:, None], torch.arange(len(row))[None]
    np.testing.assert_array_equal(rule(None, None, queries, keys).numpy(), allowed(row, window)[prefix:])


@pytest.mark.parametrize("kind", ["full", "causal", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_products_and_the_kernel_agree(kind, dtype):
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, 12, 16).to(dtype) for heads in (6, 2, 2))
    mask = torch.zeros(1, 1, 12, 12, dtype=dtype).masked_fill_(
        torch.rand(12, 12) < 0.4, torch.finfo(dtype).min
    )
    how = {"causal": kind == "causal", "mask": mask if kind == "masked" else None}
    (one, sums), (other, other_sums) = (
        f(query, key, value, 0.25, **how) for f in (attend, attend_by_products)
    )
    loose = dtype == torch.bfloat16
    torch.testing.assert_close(one, other, atol=2e-2 if loose else 1e-6, rtol=1e-2 if loose else 1e-5)
    torch.testing.assert_close(sums, other_sums, atol=1e-2 if loose else 1e-5, rtol=0)
    assert sums.dtype == torch.float32


@pytest.mark.parametrize("grouping", [True, False])
def test_a_kernel_that_takes_a_key_head_for_each_head_gets_one(grouping, monkeypatch):
    """That of older torch, seen in 2.6, which reads behind the last key head where there are fewer."""
    real = attention._KERNEL
    asked = []

    def kernel(query, key, value, *how, **named):
        asked.append(query.shape[1] // key.shape[1])
        if not grouping and query.shape[1] != key.shape[1]:  # as the older one: head h reads key head h
            wide = [torch.as_strided(x, (1, query.shape[1], *x.shape[2:]), x.stride()) for x in (key, value)]
            return real(query, *wide, *how, **named)
        return real(query, key, value, *how, **named)

    monkeypatch.setattr(attention, "_KERNEL", kernel)
    attention._kernel_groups_heads.cache_clear()
    assert attention._kernel_groups_heads() == grouping
    torch.manual_seed(2)
    query, key, value = (torch.randn(1, heads, 12, 16) for heads in (6, 2, 2))
    for causal in (True, False):
        (one, sums), (other, other_sums) = (
            f(query, key, value, 0.25, causal=causal) for f in (attend, attend_by_products)
        )
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(sums, other_sums, atol=1e-5, rtol=0)
    assert asked[1:] == [3 if grouping else 1] * 2
    attention._kernel_groups_heads.cache_clear()


def test_an_attention_that_asks_for_more_is_refused():
    row, _ = row_of([[1, 2]])
    tensors = [torch.zeros(1, 1, 2, 4)] * 3
    for asked in ({"softcap": 50.0}, {"s_aux": torch.zeros(1)}, {"position_bias": torch.zeros(1)}):
        with pytest.raises(UnknownAttentionError, match=next(iter(asked))):
            SegmentAttention(row, 0, Sizes())(None, *tensors, None, **asked)
    SegmentAttention(row, 0, Sizes())(None, *tensors, None, softcap=None, dropout=0.0)


def test_a_models_own_attention_is_back_after_a_pass():
    model = tiny("llama", "sdpa")
    with pytest.raises(ZeroDivisionError), attention_in_place(model.model, lambda *_, **__: 1 / 0):
        model(torch.tensor([[1, 2]]))
    assert model.config._attn_implementation == "sdpa"
    assert attention.NAME not in attention.ALL_ATTENTION_FUNCTIONS
    assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()


# -------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("kept_apart", [True, False])
def test_log_probabilities_in_memory_used_again_are_those_of_hf(kept_apart):
    """To the last bit, whatever was in the memory before, and with a hook on the head, which gets no such memory."""
    model = tiny("llama")
    hidden = torch.randn(9, model.config.hidden_size)
    head = Head(model, elements=4 * VOCABULARY)
    if kept_apart:
        model.lm_head.register_forward_hook(lambda *_: None)
    with torch.inference_mode():
        expected = torch.log_softmax(model.lm_head(hidden), -1)
        for rows in (9, 4, 9):
            # of as many rows: a product rounds by its shape
            of_hf = torch.log_softmax(model.lm_head(hidden[:rows]), -1)
            assert torch.equal(head.log_probs(hidden[:rows]), of_hf)
        position, target = np.array([8, 0, 8, 3]), np.array([5, 6, 7, 0])
        known = head.read(hidden, position, target)
    assert (head._buffer is None) == kept_apart
    np.testing.assert_allclose(known.of_targets, expected[position, target].numpy(), atol=1e-5)
    np.testing.assert_array_equal(known.top_token, expected.argmax(-1).numpy())


@pytest.mark.parametrize("vocabulary", [256, 300, 128])
def test_the_top_is_that_of_max(vocabulary):
    torch.manual_seed(2)
    values = torch.randn(40, vocabulary).mul(3).round()  # many equals: the first has to win
    best, token = top_of(values)
    assert torch.equal(best, values.amax(-1)) and torch.equal(token, values.argmax(-1))


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 10**6), n_members=st.integers(1, 5), peaked=st.floats(0.1, 8), ties=st.booleans())
def test_bounds_never_contradict_whole_distributions(seed, n_members, peaked, ties):
    generator = torch.Generator().manual_seed(seed)
    rows, vocabulary = 24, 7
    logits = torch.randn(n_members, rows, vocabulary, generator=generator) * peaked
    log_probs = (logits.round() if ties else logits).log_softmax(-1)
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    before = -torch.rand(n_members, rows, generator=generator).double() * 30
    mixture = MixtureArgmax()
    for member in range(n_members):
        mixture.add(log_probs[member], before[member].float())
    of_target = log_probs.gather(2, target.expand(n_members, rows)[..., None])[..., 0]
    top = log_probs.max(-1)
    found = settle(*(x.numpy() for x in (of_target, top.values, top.indices, target, before)))
    exact = mixture.matches(target).numpy()
    np.testing.assert_array_equal(found[found >= 0] == 1, exact[found >= 0])


def test_bounds_settle_what_members_agree_on():
    """Three members that prefer another letter: no vocabulary is needed to know."""
    of_target, top = np.log([[0.2], [0.1], [0.3]]), np.log([[0.5], [0.6], [0.4]])
    found = settle(of_target, top, np.full((3, 1), 4), np.array([1]), np.zeros((3, 1)))
    assert found.tolist() == [0]
    # and two with the target on top against one: what the third holds elsewhere is too little
    of_target, top = np.log([[0.6], [0.7], [0.1]]), np.log([[0.6], [0.7], [0.5]])
    found = settle(of_target, top, np.array([[1], [1], [4]]), np.array([1]), np.zeros((3, 1)))
    assert found.tolist() == [1]
