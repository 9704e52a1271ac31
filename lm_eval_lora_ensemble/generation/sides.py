"""Whether members run side by side or in turn: asked of their layers, then tried on the model at hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lm_eval_lora_ensemble.generation.decode import Decoder, Enter, Prompt, Side
from lm_eval_lora_ensemble.generation.settings import NextToken, Settings
from lm_eval_lora_ensemble.generation.stacked import Stacked, why_not_stacked
from lm_eval_lora_ensemble.tree.trial import in_float32

TRIAL_TOKENS = 20
"""No text of the trial is longer."""

# nats a token, as for tree rows: two orders of the same float32 operations differ by less than 1e-5 on short texts
_TOLERANCE = 1e-3
# in half precision: so many times as far from a float32 pass as a member alone is, root mean square over the tokens
_HALF_FACTOR = 2.0
_HALF_LEAST = 1e-4


class Way(NamedTuple):
    """How members run.

    Attributes:
        stacked: side by side, or in turn.
        share: whether prompts are read by the scoring engine, what they share once.
        reason: why it is not the fastest way; empty if it is.
    """

    stacked: bool
    share: bool
    reason: str = ""


MakeDecoder = Callable[[Way], Decoder]


def sides_of(model: Any, names: Sequence[str], activate: Callable[[int], None], way: Way) -> list[Side]:
    """Return the forward passes that hold all members.

    Args:
        model: wrapped by PEFT, or the base model alone.
        names: PEFT's names of the members; none or one for a single answer.
        activate: makes the model answer as the member of that number.
        way: from :func:`find_way`.
    """
    if way.stacked and len(names) > 1:
        return [Side(len(names), partial(Stacked, model, names))]
    alone = [partial(_alone, activate, member) for member in range(max(1, len(names)))]
    return [Side(1, partial(_as_it_is, enter)) for enter in alone]


def find_way(
    model: Any,
    names: Sequence[str],
    activate: Callable[[int], None],
    make: MakeDecoder,
    vocabulary: int,
    *,
    share: bool = True,
) -> Way:
    """Return the fastest way that gives what each member gives alone, on a few short texts.

    Args:
        model: wrapped by PEFT, or the base model alone.
        names: PEFT's names of the members.
        activate: makes the model answer as the member of that number.
        make: a decoder that runs this way.
        vocabulary: number of tokens V.
        share: whether the scoring engine has this model.
    """
    why_not = why_not_stacked(model, names) if len(names) > 1 else "there is one member"
    fast = Way(stacked=why_not is None, share=True, reason=why_not or "")
    ways = [fast, fast._replace(share=False), Way(stacked=False, share=True), Way(stacked=False, share=False)]
    reason = fast.reason
    for way in dict.fromkeys(way for way in ways if share or not way.share):
        if not way.stacked and not way.share:
            break
        failed = _trial(model, max(1, len(names)), activate, make(way), way, vocabulary)
        if failed is None:
            return way._replace(reason=reason)
        reason = failed
    return Way(stacked=False, share=False, reason=reason)


def _trial(
    model: Any, members: int, activate: Callable[[int], None], decoder: Decoder, way: Way, vocabulary: int
) -> str | None:
    """Decode three short texts and compare every token with each member's pass over the whole text."""
    draw = np.random.default_rng(0).integers(0, vocabulary, size=(4, 6)).tolist()
    beginning, *rests = draw
    texts = [[*beginning, *rest[: 6 - 2 * i]] for i, rest in enumerate(rests)]
    shared = len(beginning) if way.share else 0
    prompts = [Prompt(text, 3, lambda: 0.0) for text in texts]
    greedy = NextToken(Settings(min_new_tokens=3), sorted(decoder.end_tokens))  # whatever the model would say
    try:
        traces = dict(decoder.decode(prompts, shared, greedy, lambda _: False))
    except (RuntimeError, ValueError, IndexError, AttributeError) as error:
        return (
            f"members side by side fail in a trial ({type(error).__name__})"
            if way.stacked
            else type(error).__name__
        )
    found = np.concatenate([traces[i].members for i in range(len(texts))], axis=1)
    whole = [[*text, *traces[i].tokens.tolist()] for i, text in enumerate(texts)]
    alone = partial(_alone_log_probs, model, members, activate, whole)
    by_itself = alone()
    if not np.isfinite(by_itself).all():
        return None  # broken weights: decoding names the member
    dtype = next(iter(model.parameters())).dtype
    if dtype in (torch.float32, torch.float64):
        worst = float(np.abs(found - by_itself).max())
        return (
            None
            if worst <= _TOLERANCE
            else f"texts decoded together differ by {worst:.2g} nats a token in a trial"
        )
    with in_float32(model):
        exact = alone()
    allowed = max(_HALF_FACTOR * _root_mean_square(by_itself - exact), _HALF_LEAST)
    off = _root_mean_square(found - exact)
    return None if off <= allowed else f"texts decoded together differ by {off:.2g} nats a token in a trial"


def _alone_log_probs(
    model: Any, members: int, activate: Callable[[int], None], texts: Sequence[Sequence[int]]
) -> npt.NDArray[np.float64]:
    """Return each member's log-probability of the last three tokens of each text, float64 [N, 3 · texts]."""
    device = model.get_input_embeddings().weight.device
    found = np.empty((members, 3 * len(texts)))
    for member, (i, text) in itertools.product(range(members), enumerate(texts)):
        with _alone(activate, member), torch.inference_mode():
            logits = model(input_ids=torch.tensor([text[:-1]], device=device)).logits[0, -3:].float()
        log_probs = torch.log_softmax(logits, dim=-1).cpu()
        found[member, 3 * i : 3 * i + 3] = log_probs[range(3), list(text[-3:])].double().numpy()
    return found


@contextmanager
def _alone(activate: Callable[[int], None], member: int) -> Iterator[None]:
    activate(member)
    yield


def _as_it_is(enter: Enter) -> Enter:
    return enter


def _root_mean_square(errors: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
