"""The parts of decoding on their own: which prompts share what, where a text ends, what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.utils import postprocess_generated_text
from test_generation import asked
from test_model import lora

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.generation.measures import answer_measures, effective_members, token_measures
from lm_eval_lora_ensemble.generation.mixture import log_mixture, log_weights
from lm_eval_lora_ensemble.generation.plan import plan
from lm_eval_lora_ensemble.generation.settings import NextToken, Settings
from lm_eval_lora_ensemble.generation.stopping import StopStrings, kept_part

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=30)


@given(TEXTS, st.integers(1, 9), st.booleans())
def test_every_prompt_is_in_one_batch_and_shares_what_the_others_begin_with(prompts, size, share):
    batches = plan(prompts, size, share=share)
    assert sorted(i for batch in batches for i in batch.prompts) == list(range(len(prompts)))
    for batch in batches:
        assert len(batch.prompts) <= size
        assert len({tuple(prompts[i][: batch.shared]) for i in batch.prompts}) == 1
        assert batch.shared < min(len(prompts[i]) for i in batch.prompts)
        assert share or batch.shared == 0


def test_tasks_of_their_own_beginnings_are_batches_of_their_own():
    system, one, other = [9] * 20, [1] * 30, [2] * 40
    prompts = [[*system, *one, i] for i in range(8)] + [[*system, *other, i] for i in range(8)]
    shared = {len(system) + len(one), len(system) + len(other)}
    assert {batch.shared for batch in plan(prompts, 4, share=True)} == shared
    assert {batch.shared for batch in plan(prompts, 16, share=True)} == {len(system)}


def characters(tokens) -> str:
    return "".join(map(chr, tokens))


@given(
    st.text("ab.<> \n", max_size=30),
    st.lists(st.text("ab.", min_size=0, max_size=2), max_size=3),
    st.sampled_from([None, "<>", ord(">")]),
)
def test_what_is_kept_is_what_lm_eval_keeps(text, stops, think):
    tokens = [ord(c) for c in text]
    expected = text
    if isinstance(think, int):
        expected = expected.rpartition(chr(think))[2].lstrip()
    expected = postprocess_generated_text(expected, stops, think if isinstance(think, str) else None)
    kept = kept_part(tokens, characters, stops, think)
    assert kept.text == expected
    part = characters(tokens[kept.start : kept.stop])
    ended = 1 if kept.cut else 0
    assert part[: len(part) - ended].lstrip() == expected if think else part[: len(part) - ended] == expected
    assert not kept.cut or kept.stop > kept.start


def test_a_stop_string_ends_a_text_however_it_is_cut_into_tokens():
    stops = StopStrings(["ab", ""], lambda text: [0] * len(text), characters)
    assert not stops.reached([ord(c) for c in "xa"])
    assert stops.reached([ord(c) for c in "xab"])
    assert not stops.reached([ord(c) for c in "abxxxx"])  # long ago: it was reached then


def test_measures_are_their_definitions():
    p = np.random.default_rng(0).dirichlet(np.full(7, 0.5), size=(3, 4))
    log_p = torch.from_numpy(np.log(p))
    total, data = (value.numpy() for value in token_measures(log_p))
    mean = p.mean(axis=0)
    np.testing.assert_allclose(total, -(mean * np.log(mean)).sum(-1))
    np.testing.assert_allclose(data, -(p * np.log(p)).sum(-1).mean(0))
    scores = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 4)) * 3)
    weights = torch.softmax(scores, dim=0).numpy()
    posterior = log_weights(scores, "posterior")
    np.testing.assert_allclose(log_mixture(log_p, posterior).exp(), (weights[:, :, None] * p).sum(0))
    np.testing.assert_allclose(effective_members(posterior), 1 / (weights**2).sum(0))
    np.testing.assert_allclose(log_mixture(log_p, log_weights(scores, "equal")).exp(), mean)
    found = answer_measures(
        np.log([[0.5, 0.25], [0.125, 0.5]]), np.log([0.3, 0.4]), np.ones(2), np.full(2, 0.75)
    )
    assert found["answer_nll"] == pytest.approx(-np.log((0.125 + 0.0625) / 2))
    assert found["reverse_mutual_information"] == pytest.approx(
        (np.log((0.125 + 0.0625) / 2) - np.log([0.125, 0.0625]).mean()) / 2
    )
    assert found["mean_token_mutual_information"] == pytest.approx(0.25)
    assert found["max_token_nll"] == pytest.approx(-np.log(0.3))
    assert np.isnan(list(answer_measures(np.empty((2, 0)), *[np.empty(0)] * 3).values())).all()


def test_a_token_that_a_member_rules_out_has_no_entropy():
    log_p = torch.log(torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]))
    total, data = token_measures(log_p)
    assert torch.isfinite(total).all()
    assert float(data) == pytest.approx(np.log(2) / 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"temprature": 0.5}, "cannot follow temprature; did you mean temperature"),
        ({"penalty_alpha": 0.5}, "cannot follow penalty_alpha"),
        ({"do_sample": True}, "temperature"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": -3}, "top_k"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"max_gen_toks": 256}, "max_gen_toks=256"),
    ],
)
def test_arguments_that_cannot_be_followed_are_named(ensemble, arguments, said):
    with pytest.raises(EnsembleError, match=re.escape(said)) as caught:
        lora(ensemble).generate_until(asked(["The members"], **arguments), disable_tqdm=True)
    assert "\n" not in str(caught.value)


def test_the_base_models_own_settings_hold_or_are_refused():
    own = transformers.GenerationConfig(repetition_penalty=1.1, top_k=7, do_sample=True)
    found = Settings.of({"do_sample": True, "temperature": 0.5, "top_k": 0}, own)
    assert (found.repetition_penalty, found.top_k, found.temperature) == (1.1, 0, 0.5)
    assert not Settings.of({"temperature": 0.0}, own).do_sample
    with pytest.raises(EnsembleError, match=r"generation_config\.json sets bad_words_ids"):
        Settings.of({}, transformers.GenerationConfig(bad_words_ids=[[3]]))


def test_penalties_act_on_the_mixtures_log_probabilities():
    log_p = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    again = NextToken(Settings(repetition_penalty=2.0), [])
    assert again.choose(log_p, [[0, 5]], 0, [0.0]).tolist() == [1]
    assert NextToken(Settings(), []).choose(log_p, [[0, 5]], 0, [0.0]).tolist() == [0]
    assert NextToken(Settings(min_new_tokens=1), [0]).choose(log_p, [[2]], 0, [0.0]).tolist() == [1]
    assert NextToken(Settings(min_new_tokens=1), [0]).choose(log_p, [[2]], 1, [0.0]).tolist() == [0]
    assert NextToken(Settings(suppress_tokens=[0, 1]), []).choose(log_p, [[2]], 0, [0.0]).tolist() == [2]


def test_a_draw_inverts_the_cumulative_distribution():
    log_p = torch.log(torch.tensor([[0.5, 0.0, 0.3, 0.2]] * 5))
    choose = NextToken(Settings(do_sample=True, top_k=0), [])
    drawn = choose.choose(log_p, [[1]] * 5, 0, [0.0, 0.49, 0.51, 0.79, 0.999999])
    assert drawn.tolist() == [0, 0, 2, 2, 3]
