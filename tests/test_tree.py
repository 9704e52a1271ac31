"""The one tree: its rows and mask against their definition, and on every architecture against plain sequences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, VOCABULARY, WAYS, compute_in_float64, tiny, with_adapters

from lm_eval_lora_ensemble.scoring.attention import UnknownAttentionError
from lm_eval_lora_ensemble.scoring.forward import PackedModel, shared_layers
from lm_eval_lora_ensemble.scoring.packed import PackedScorer
from lm_eval_lora_ensemble.scoring.tuning import Tuning
from lm_eval_lora_ensemble.train import tree as training_tree
from lm_eval_lora_ensemble.train.base import Base
from lm_eval_lora_ensemble.train.examples import Choice, Example
from lm_eval_lora_ensemble.train.layout import Layout
from lm_eval_lora_ensemble.train.objective import ScoredHead, document_losses, loglikelihoods
from lm_eval_lora_ensemble.tree.requests import TokenRequest, truncate
from lm_eval_lora_ensemble.tree.rows import RowBatch, chain, interval_mask, lay_out
from lm_eval_lora_ensemble.tree.segments import Sizes
from lm_eval_lora_ensemble.tree.support import why_no_segments, why_no_tree
from lm_eval_lora_ensemble.tree.trial import in_float32, trial_error
from lm_eval_lora_ensemble.tree.trie import PrefixTrie

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=7)


def trie_of(found: list[list[int]]) -> PrefixTrie:
    return PrefixTrie([TokenRequest(tuple(sequence), (sequence[-1],)) for sequence in found])


# --------------------------------------------------------------------------------------- rows and mask


@settings(max_examples=300, deadline=None)
@given(found=sequences)
def test_a_token_sees_its_ancestors_and_itself(found):
    """The mask from one integer a token is the relation "is a prefix of", whatever the tree."""
    trie = trie_of(found)
    row = lay_out(trie, 0, len(trie.sequences))
    assert len(row) == trie.n_positions
    prefix = {}
    for i, path in row.paths.items():
        for place in path.tolist():
            prefix[place] = trie.sequences[i][: int(row.positions[place]) + 1]
    mask = interval_mask(torch.from_numpy(row.end))
    for q in range(len(row)):
        for k in range(len(row)):
            assert bool(mask[q, k]) == (prefix[q][: len(prefix[k])] == prefix[k])


@settings(max_examples=100, deadline=None)
@given(found=sequences, extra=st.integers(0, 5))
def test_padding_sees_itself_alone_and_nobody_sees_it(found, extra):
    trie = trie_of(found)
    rows = [lay_out(trie, 0, len(trie.sequences)), chain(found[0])]
    length = max(map(len, rows)) + extra
    mask = interval_mask(RowBatch.pad(rows, length).end)
    for row, of_row in zip(rows, mask, strict=True):
        n = len(row)
        torch.testing.assert_close(of_row[:n, :n], interval_mask(torch.from_numpy(row.end)))
        assert not of_row[:n, n:].any() and not of_row[n:, :n].any()
        torch.testing.assert_close(of_row[n:, n:], torch.eye(length - n, dtype=torch.bool))


def test_a_chain_is_plain_causality():
    row = chain([5, 6, 7, 8], depth=10)
    assert row.is_chain and row.positions.tolist() == [10, 11, 12, 13]
    torch.testing.assert_close(
        interval_mask(torch.from_numpy(row.end)), torch.ones(4, 4, dtype=torch.bool).tril()
    )


def test_the_mask_is_added_not_applied():
    batch = RowBatch.pad([chain([1, 2])], 3)
    mask = batch.attention_mask(torch.float32, prefix=2)[0, 0]
    least = torch.finfo(torch.float32).min
    assert mask.tolist() == [
        [0, 0, 0, least, least],
        [0, 0, 0, 0, least],
        [0, 0, least, least, 0],
    ]


# ------------------------------------------------------------------------------- against plain sequences

SHARED = (3, 5, 7, 11, 13, 17, 19)
EXAMPLES = [
    Example(
        "t",
        0,
        (
            Choice(SHARED, (20, 21, 22)),
            Choice(SHARED, (20, 21)),
            Choice(SHARED, (23, 24, 25, 26)),
            Choice((*SHARED[:3], 40), (41, 42)),
        ),
        (2,),
    ),
    Example("t", 1, (Choice(SHARED[:4], (50,)), Choice(SHARED[:4], (51,)), Choice((9,), (50, 3))), (0,)),
]


def plain_log_probs(model, context: tuple[int, ...], continuation: tuple[int, ...]) -> torch.Tensor:
    tokens = torch.tensor([(*context, *continuation)[:-1]])
    log_probs = model(tokens, use_cache=False).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return log_probs[list(places), list(continuation)].sum()


@pytest.mark.parametrize(("architecture", "attention"), WAYS)
def test_training_scores_are_those_of_plain_sequences(architecture, attention):
    """Gemma 2 runs eager by default; a boolean mask, which eager adds, puts it .7 nats off."""
    model = tiny(architecture, attention)
    layout = Layout(EXAMPLES, gold_only=False, use_tree=True, dtype=model.dtype)
    batch = layout.batch([range(len(EXAMPLES))], max(layout.lengths()) + 2, torch.device("cpu"))
    with torch.no_grad():
        rows = loglikelihoods(ScoredHead(model).logits(batch), batch)[0]
        for d, example in enumerate(EXAMPLES):
            for c, choice in enumerate(example.choices):
                expected = plain_log_probs(model, choice.context, choice.continuation)
                assert float(rows[d, c]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(("architecture", "attention"), WAYS)
def test_gradients_of_two_steps_are_those_of_plain_sequences(architecture, attention, monkeypatch):
    """In float64, where nothing but a wrong mask or position could tell the two apart."""
    model = with_adapters(tiny(architecture, attention, torch.float64), 1).double()
    compute_in_float64(model, monkeypatch)
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for parameter in parameters.values():
        parameter.requires_grad_()
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(2):
        gradients = []
        for use_tree in (False, True):
            layout = Layout(EXAMPLES, gold_only=False, use_tree=use_tree, dtype=torch.float64)
            batch = layout.batch([range(len(EXAMPLES))], max(layout.lengths()) + 1, torch.device("cpu"))
            lls = loglikelihoods(ScoredHead(model.base_model.model).logits(batch), batch)
            optimiser.zero_grad()
            document_losses(lls, batch, "choices").sum().backward()
            gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        for name, plain in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], plain, atol=1e-9, rtol=0)
        assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-2
        optimiser.step()


def requests(n: int = 6) -> list[TokenRequest]:
    draw = np.random.default_rng(3)
    stem = draw.integers(0, VOCABULARY, 20).tolist()
    found = []
    for _ in range(n):
        question = draw.integers(0, VOCABULARY, 6).tolist()
        found += [truncate(stem + question, draw.integers(0, VOCABULARY, k).tolist(), 256) for k in (1, 1, 3)]
    return found


TUNING = Tuning(tokens=64, masked_tokens=64, logits=4096, sizes=Sizes(square=5, whole=8, block=6, carried=3))


def score(model, asked: list[TokenRequest], shared: int, attention: str, budget: int = 40) -> np.ndarray:
    names = list(model.peft_config)
    scorer = PackedScorer(
        PackedModel(model, TUNING, shared, attention),
        lambda member: model.set_adapter(names[member]),
        n_members=len(names),
        token_budget=budget,
    )
    with torch.inference_mode():
        scores = dict(scorer.score(asked))
    return np.array([scores[i].loglikelihoods for i in range(len(asked))]).T


def plain_scores(model, asked: list[TokenRequest]) -> np.ndarray:
    members = []
    with torch.inference_mode():
        for name in model.peft_config:
            model.set_adapter(name)
            members.append(
                [
                    float(plain_log_probs(model, r.tokens[: len(r.tokens) + 1 - len(r.targets)], r.targets))
                    for r in asked
                ]
            )
    return np.array(members)


@pytest.mark.parametrize(
    ("attention", "asked", "budget"),
    [
        ("flex", None, 90),
        ("segments", None, 90),
        ("masked", None, 40),
        ("segments", 500, 500),
        ("masked", 500, 40),
    ],
)
def test_a_pass_is_kept_small_only_under_one_mask(attention, asked, budget):
    tuning = replace(TUNING, tokens=90, masked_tokens=40)
    packed = PackedModel(tiny("llama", "sdpa"), tuning, attention=attention)
    assert packed.token_budget(asked) == budget


@pytest.mark.parametrize(("architecture", "attention"), WAYS)
@pytest.mark.parametrize("layers", [None, [1, 2], [2]], ids=["all", "upper-two", "last"])
def test_scores_are_those_of_plain_sequences(architecture, attention, layers):
    """With shared lower layers too, on models that look up masks and rotary embeddings by a layer's place."""
    lora = {} if layers is None else {"layers_to_transform": layers}
    model = with_adapters(tiny(architecture, attention), 2, **lora)
    shared = shared_layers(model)
    assert shared == (0 if layers is None else layers[0])
    assert why_no_tree(model, 30) is None and why_no_segments(model, 30) is None
    asked = requests()
    expected = plain_scores(model, asked)
    np.testing.assert_allclose(score(model, asked, shared, "masked"), expected, atol=1e-4)
    if architecture == "gemma2":
        with pytest.raises(UnknownAttentionError, match="softcap"):
            score(model, asked, shared, "segments")
    else:
        for way in ("segments", "flex"):
            np.testing.assert_allclose(score(model, asked, shared, way), expected, atol=1e-4)
    # nothing of the model is left changed
    np.testing.assert_allclose(plain_scores(model, asked), plain_scores(model, asked), atol=0)
    assert not any("forward" in vars(layer) for layer in model.get_base_model().get_decoder().layers)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
@pytest.mark.parametrize("window", [3, 9, 17, 25])
def test_segments_keep_a_window_inside_the_row(architecture, window):
    """Beside full layers in one model, as in Gemma 3, and across passes on a kept prefix."""
    model = with_adapters(tiny(architecture, "sdpa", sliding_window=window), 2)
    asked = requests()
    assert max(len(one.tokens) for one in asked) > window
    for budget in (12, 40, 1000):
        np.testing.assert_allclose(
            score(model, asked, 0, "segments", budget), plain_scores(model, asked), atol=1e-4
        )


@pytest.mark.parametrize("architecture", CONFIGS)
def test_masks_refuse_sequences_beyond_the_window(architecture):
    model = tiny(architecture)
    window = getattr(model.config, "sliding_window", None)
    assert why_no_tree(model, 64) is None
    reason = why_no_tree(model, 65)
    assert reason is None if window is None else "sliding window of 64" in reason


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "yarn"])
def test_rotary_embeddings_of_a_batch_are_refused_beyond_what_was_trained(kind):
    """They would depend on which sequences share a pass; those that do not are no obstacle."""
    model = tiny("llama")
    rotary = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 50}
    model.config.rope_parameters = {**model.config.rope_parameters, **rotary}
    assert why_no_segments(model, 50) is None
    reason = why_no_segments(model, 51)
    assert reason is None if kind == "yarn" else "51 tokens where 50 were trained" in reason


# ------------------------------------------------------------------------------------------- the trial


def trial(model, tree_scale: float = 1.0, tree_shift: int = 0) -> float | None:
    """Run the trial of a model whose rows are computed as they are, scaled, or from the wrong positions."""
    attention = "masked" if model.config.model_type == "gemma2" else "segments"
    packed = PackedModel(model, TUNING, attention=attention)
    scorer = PackedScorer(packed, lambda _: None, n_members=1, token_budget=20)
    head = packed.head.log_probs
    packed.head.log_probs = lambda hidden: (head(hidden) * tree_scale).log_softmax(-1)
    run = packed._run

    def shifted(stream, prefix):
        stream.position_ids = stream.position_ids * (1 + tree_shift)
        return run(stream, prefix)

    packed._run = shifted

    def rows(asked):
        scores = dict(scorer.score(asked))
        return [float(scores[i].loglikelihoods[0]) for i in range(len(asked))]

    with torch.inference_mode():
        return trial_error(rows, lambda tokens: model(tokens).logits, model, model.dtype, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_trial_passes_what_is_exact_in_every_type(architecture, dtype):
    assert trial(tiny(architecture, dtype=dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "wrong", [{"tree_scale": 0.9}, {"tree_shift": 1}], ids=lambda wrong: next(iter(wrong))
)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_trial_finds_out_what_is_not(architecture, wrong, dtype):
    error = trial(tiny(architecture, dtype=dtype), **wrong)
    assert error is not None and error > 0.02


def test_half_precision_is_allowed_what_it_costs_this_model():
    """A constant of 0.3 nats, as in 0.1.0, would have let logits scaled by a tenth pass on this model."""
    error = trial(tiny("llama", dtype=torch.float16), tree_scale=0.98)
    assert error is not None and error < 0.3


def test_a_float32_pass_leaves_the_model_as_it_was():
    model = with_adapters(tiny("llama", dtype=torch.bfloat16), 1)
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        half = model(tokens).logits
        with in_float32(model):
            wide = model(tokens).logits
        again = model(tokens).logits
    exact = with_adapters(tiny("llama", dtype=torch.bfloat16), 1).float()(tokens).logits
    assert wide.dtype == torch.float32 and half.dtype == torch.bfloat16
    torch.testing.assert_close(wide, exact.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, half, atol=0, rtol=0)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before


def test_a_failure_inside_a_float32_pass_puts_the_weights_back():
    model = tiny("llama", dtype=torch.bfloat16)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), in_float32(model), torch.inference_mode():
        model(torch.tensor([[1, 2]]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_training_may_use_the_tree_and_its_trial_agrees(architecture):
    base = Base(tiny(architecture), None, architecture, 256)
    assert training_tree.why_no_tree_rows(base, EXAMPLES) is None
    assert training_tree.failed_trial(base) is None


def test_a_model_that_rows_would_get_wrong_fails_trainings_trial(monkeypatch):
    """What no configuration tells: positions that do not come from ``position_ids``."""
    model = tiny("llama")
    rotary = model.model.rotary_emb.forward
    monkeypatch.setattr(
        model.model.rotary_emb,
        "forward",
        lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None].expand(len(x), -1)),
    )
    reason = training_tree.failed_trial(Base(model, None, "llama", 256))
    assert reason is not None and "nats a token in a trial" in reason
