"""Decoding against a reference without any cache, which runs every member over the whole text for each token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from tiny_models import VOCABULARY, compute_in_float64, tiny, with_adapters

from lm_eval_lora_ensemble.generation.answer import Trace
from lm_eval_lora_ensemble.generation.decode import Decoder, NonFiniteLogitsError, Prompt
from lm_eval_lora_ensemble.generation.plan import plan
from lm_eval_lora_ensemble.generation.prompts import PromptReader
from lm_eval_lora_ensemble.generation.settings import NextToken, Settings
from lm_eval_lora_ensemble.generation.sides import Way, find_way, sides_of
from lm_eval_lora_ensemble.scoring.forward import PackedModel, shared_layers
from lm_eval_lora_ensemble.scoring.tuning import Tuning
from lm_eval_lora_ensemble.tree.segments import Sizes

END = tuple(range(0, VOCABULARY, 12))  # tokens that end a text, so many that some texts meet one
MODULES = ["q_proj", "v_proj", "down_proj", "lm_head"]


def random_prompts(n: int, shortest: int = 1, longest: int = 64, common: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(3)
    beginning = draw.integers(0, VOCABULARY, common).tolist()
    return [
        [*beginning, *draw.integers(0, VOCABULARY, int(draw.integers(shortest, longest + 1))).tolist()]
        for _ in range(n)
    ]


@pytest.fixture
def ensemble_of(monkeypatch):
    """Makes members on a tiny model that computes in float64: what differs by more than 1e-5 is wrong, not rounded."""

    def make(architecture: str, members: int = 3, attention: str = "sdpa", **lora: Any):
        base = tiny(architecture, attention, torch.float64)
        model = with_adapters(base, members, **{"target_modules": MODULES, **lora}).double()
        compute_in_float64(model, monkeypatch)
        return model, [f"member_{m}" for m in range(members)]

    return make


def reader_of(model, names, attention="segments", budget=30) -> PromptReader:
    """Reads in passes and pieces so small that a few short prompts go through every kind of both."""
    tuning = Tuning(tokens=budget, masked_tokens=budget, logits=1 << 16, sizes=Sizes(6, 8, 4, 4))
    return PromptReader(
        PackedModel(model, tuning, shared_layers(model), attention),
        lambda member: model.set_adapter(names[member]),
        n_members=len(names),
        token_budget=budget,
    )


def decoder_of(model, names, way: Way, average="posterior", **reading: Any) -> Decoder:
    sides = sides_of(model, names, lambda member: model.set_adapter(names[member]), way)
    reader = reader_of(model, names, **reading) if way.share else None
    return Decoder(model, sides, average=average, end_tokens=END, reader=reader)


def way_of(model, names) -> Way:
    return find_way(
        model,
        names,
        lambda member: model.set_adapter(names[member]),
        lambda way: decoder_of(model, names, way),
        VOCABULARY,
    )


def decode_all(
    decoder: Decoder, texts, batch_size: int, new: int, *, share: bool, settings=None, draws=None
) -> list[Trace]:
    found: dict[int, Trace] = {}
    choose = NextToken(settings or Settings(), END)
    for batch in plan(texts, batch_size, share=share):
        chosen = [Prompt(texts[i], new, draws[i] if draws else lambda: 0.0) for i in batch.prompts]
        for place, trace in decoder.decode(chosen, batch.shared, choose, lambda _: False):
            found[batch.prompts[place]] = trace
    return [found[i] for i in range(len(texts))]


@torch.no_grad()
def reference(model, names, text, new: int, average: str = "posterior") -> Trace:
    """Decode greedily in float64 arithmetic on whole passes: nothing is kept from one token to the next."""
    scores = np.zeros(len(names))
    tokens: list[int] = []
    rows = []
    while len(tokens) < new and not set(END) & set(tokens):
        log_p = []
        for name in names:
            model.set_adapter(name)
            log_p.append(
                model(input_ids=torch.tensor([[*text, *tokens]]))
                .logits[0, -1]
                .double()
                .log_softmax(-1)
                .numpy()
            )
        p = np.exp(np.array(log_p))
        weights = np.exp(scores - scores.max()) if average == "posterior" else np.ones(len(names))
        weights /= weights.sum()
        mixture = weights @ p
        token = int(mixture.argmax())
        equal = p.mean(axis=0)
        rows.append(
            [
                np.log(mixture[token]),
                -(equal * np.log(equal)).sum(),
                -(p * np.log(p)).sum(axis=1).mean(),
                1 / (weights**2).sum(),
                *np.log(p[:, token]),
            ]
        )
        scores += np.log(p[:, token])
        tokens.append(token)
    seen = np.array(rows).T
    return Trace(np.array(tokens), *seen[:4], seen[4:], "end_token" if tokens[-1] in END else "length")


def assert_same(ours: list[Trace], theirs: list[Trace], tolerance: float = 1e-5) -> None:
    assert [t.tokens.tolist() for t in ours] == [t.tokens.tolist() for t in theirs]
    assert [t.ended for t in ours] == [t.ended for t in theirs]
    for mine, yours in zip(ours, theirs, strict=True):
        for name in ("log_probs", "total", "data", "effective", "members"):
            np.testing.assert_allclose(
                getattr(mine, name), getattr(yours, name), rtol=tolerance, atol=tolerance, err_msg=name
            )
        np.testing.assert_allclose(
            mine.members.sum(axis=1), yours.members.sum(axis=1), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize(
    ("average", "n"),
    [("posterior", 6), ("equal", 3), pytest.param("posterior", 50, marks=pytest.mark.long)],
)
def test_the_mixture_is_what_whole_passes_give(ensemble_of, architecture, average, n):
    """Prompts and texts together are longer than the window of 64 tokens of Mistral and Gemma 3."""
    model, names = ensemble_of(architecture)
    prompts = random_prompts(n)
    ours = decode_all(decoder_of(model, names, Way(True, True), average), prompts, 8, 20, share=False)
    theirs = [reference(model, names, text, 20, average) for text in prompts]
    assert_same(ours, theirs)
    spread = np.concatenate([t.members.std(axis=0) for t in theirs])
    assert spread.max() > 0.1  # members differ, or the comparison above would prove nothing
    assert {t.ended for t in ours} == {"end_token", "length"}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_padding_batches_order_and_beginnings_change_nothing(ensemble_of, architecture):
    """Beginnings are shared in reach of Gemma 3's window too."""
    model, names = ensemble_of(architecture)
    prompts = random_prompts(4, 1, 9, common=20) + random_prompts(1, 66, 66) + random_prompts(3, 1, 8)
    prompts += [prompts[0], prompts[1][:-1]]
    way = Way(True, True)
    masked = [(decoder_of(model, names, way, attention="masked", budget=1000), 4, True)]
    assert max(batch.shared for batch in plan([tuple(p) for p in prompts], 4, share=True)) == 20
    alone = decode_all(decoder_of(model, names, Way(True, False)), prompts, 1, 6, share=False)
    for decoder, size, share in [
        (decoder_of(model, names, way), 4, True),
        *(masked if architecture == "llama" else []),  # one mask has no window
        (decoder_of(model, names, way, budget=1), 10, False),
        (decoder_of(model, names, Way(True, False)), 5, False),
        (decoder_of(model, names, Way(False, True)), 4, True),
        (decoder_of(model, names, Way(False, False)), 5, False),
    ]:
        assert_same(decode_all(decoder, prompts, size, 6, share=share), alone)
        back = decode_all(decoder, prompts[::-1], size, 6, share=share)[::-1]
        assert_same(back, alone)


def test_layers_that_members_share_are_read_once(ensemble_of):
    model, names = ensemble_of("llama", layers_to_transform=[1], target_modules=["q_proj", "down_proj"])
    assert shared_layers(model) == 1
    prompts = random_prompts(5, 1, 9, common=18)
    ours = decode_all(decoder_of(model, names, Way(True, True)), prompts, 3, 6, share=True)
    assert_same(ours, [reference(model, names, text, 6) for text in prompts])


def test_a_beginning_is_read_once_for_all_batches(ensemble_of, monkeypatch):
    model, names = ensemble_of("llama")
    prompts = random_prompts(8, 3, 3, common=40)
    read = []
    right = PackedModel.hidden
    monkeypatch.setattr(
        PackedModel,
        "hidden",
        lambda self, stream, *a: (read.append(stream.input_ids.numel()), right(self, stream, *a))[1],
    )
    decode_all(decoder_of(model, names, Way(True, True)), prompts, 2, 2, share=True)
    assert sum(read) == len(names) * (40 + 8 * 3)


@pytest.mark.parametrize(
    ("lora", "stacked"),
    [
        ({}, True),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True}, True),
        ({"use_dora": True}, False),
        ({"lora_bias": True}, False),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    ],
)
def test_members_run_side_by_side_where_their_layers_allow(ensemble_of, lora, stacked):
    model, names = ensemble_of("llama", **lora)
    way = way_of(model, names)
    assert (way.stacked, way.share) == (stacked, True), way.reason
    prompts = random_prompts(4, 5, 9)
    ours = decode_all(decoder_of(model, names, way), prompts, 4, 6, share=False)
    assert_same(ours, [reference(model, names, text, 6) for text in prompts])


def test_members_of_different_ranks_and_layers_run_side_by_side(ensemble_of):
    from peft import LoraConfig

    model, names = ensemble_of("llama", 2)
    model.add_adapter("member_2", LoraConfig(r=7, lora_alpha=3, target_modules=["k_proj", "q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name and "member_2" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    names = [*names, "member_2"]
    prompts = random_prompts(4, 5, 9)
    ours = decode_all(decoder_of(model, names, Way(True, True)), prompts, 4, 6, share=False)
    assert_same(ours, [reference(model, names, text, 6) for text in prompts])


def test_a_trial_that_fails_lets_members_run_in_turn(ensemble_of, monkeypatch):
    from peft.tuners import lora

    from lm_eval_lora_ensemble.generation import stacked

    model, names = ensemble_of("llama")
    right = stacked._Update.__call__
    monkeypatch.setattr(stacked._Update, "__call__", lambda self, x, *a, **k: right(self, x.flip(0), *a, **k))
    way = way_of(model, names)
    assert not way.stacked
    assert "nats a token in a trial" in way.reason
    assert all("forward" not in vars(module) for module in model.modules() if isinstance(module, lora.Linear))


def test_a_member_that_gives_no_number_is_named(ensemble_of):
    model, names = ensemble_of("llama")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B.member_1" in n).fill_(float("nan"))
    with pytest.raises(NonFiniteLogitsError) as caught:
        decode_all(decoder_of(model, names, Way(True, True)), random_prompts(3, 4, 6), 3, 4, share=False)
    assert caught.value.member == 1


def test_draws_follow_the_mixture_exactly(ensemble_of):
    """Chi-square of 4,000 second tokens, given the first, at the 0.1 % level; the seed is fixed."""
    model, names = ensemble_of("llama")
    text = random_prompts(1, 6, 6)[0]
    settings = Settings(do_sample=True, temperature=1.3, top_k=0, top_p=0.9)
    draws = np.random.default_rng(17)
    n = 4000
    traces = decode_all(
        Decoder(model, sides_of(model, names, model.set_adapter, Way(True, False))),
        [text] * n,
        500,
        2,
        share=False,
        settings=settings,
        draws=[lambda: float(draws.random())] * n,
    )
    first = [int(t.tokens[0]) for t in traces]
    assert_frequencies(first, expected(model, names, text, []), n)
    token = max(set(first), key=first.count)
    second = [int(t.tokens[1]) for t in traces if t.tokens[0] == token and len(t.tokens) > 1]
    assert len(second) > 200
    assert_frequencies(second, expected(model, names, text, [token]), len(second))


@torch.no_grad()
def expected(model, names, text, said):
    """Return the exact distribution of the next token: the mixture, then temperature, then the nucleus."""
    joint = 0.0
    for name in names:
        model.set_adapter(name)
        log_p = model(input_ids=torch.tensor([[*text, *said]])).logits[0].double().log_softmax(-1)
        past = sum(log_p[len(text) - 1 + i, token] for i, token in enumerate(said))
        joint = joint + torch.exp(past + log_p[-1])
    p = (joint / joint.sum()).pow(1 / 1.3).numpy()
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), 0.9)) + 1]
    nucleus = np.zeros_like(p)
    nucleus[kept] = p[kept] / p[kept].sum()
    return nucleus


def assert_frequencies(tokens, probabilities, n) -> None:
    assert set(tokens) <= set(np.flatnonzero(probabilities).tolist())
    counts = np.bincount(tokens, minlength=VOCABULARY).astype(float)
    large = probabilities * n >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(probabilities[large], probabilities[~large].sum()) * n
    if wanted[-1] < 1e-9:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 2
    assert scipy.stats.chisquare(observed, wanted).pvalue > 0.001
