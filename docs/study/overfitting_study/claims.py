"""The paper's claims, each as one measured number, and what the number says about it.

A number bears a claim out where every interval of it lies on the claimed side of 0; Student's over seeds is one of
them. It denies the claim where every interval lies on the other side, or between minus and plus the least that would
matter, which is declared for each. A claim that something stays is borne out between those two, and denied where every
interval lies beyond one of them. Anything else is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stepwise.values import Value

from overfitting_study.plan import EPOCHS, FOREIGN, IN_DOMAIN, LETTERS, PENALTIES, Sizes
from overfitting_study.results import (
    Detected,
    Difference,
    Ensemble,
    Kept,
    MeanMember,
    Measure,
    Of,
    OfSize,
    by_epoch,
    last,
)

FREE, PENALISED = PENALTIES
FIRST, MIDDLE, END = EPOCHS
OUTSIDE = ("arc_challenge", "hellaswag")
WRITTEN = [task for task in FOREIGN if task != LETTERS]

Side = Literal["higher", "lower", "same"]

APPEARS, NOT, UNDECIDED = "appears", "does not", "undecided"

_GAINS: tuple[tuple[str, str, Side, float], ...] = (
    ("nll", "nll", "lower", 0.01),
    ("brier_score", "Brier score", "lower", 0.005),
    ("ece", "ece", "lower", 0.01),
    ("accuracy", "accuracy", "higher", 0.01),
)


@dataclass(frozen=True)
class Claim:
    """What the paper says, as a number whose sign or size decides.

    Attributes:
        topic: which of the paper's claims it belongs to.
        words: what is claimed.
        measure: from which the number is taken.
        metric: its name there.
        side: where the number is claimed to lie; ``same`` is nearer to 0 than ``matters``.
        matters: the least difference that would matter, in the number's unit.
        documents: that it is measured on.
    """

    topic: str
    words: str
    measure: Measure
    metric: str
    side: Side
    matters: float
    documents: int

    def verdict(self, value: Value) -> str:
        """Return ``appears``, ``does not`` or ``undecided``.

        Example:
            >>> claim = Claim("", "", lambda *_: None, "nll", "lower", 0.01, 1)
            >>> [claim.verdict(Value(mid, mid - 0.01, mid + 0.01)) for mid in (-0.05, 0.05, 0.0, -0.005)]
            ['appears', 'does not', 'does not', 'undecided']
        """
        low, high = value.limits
        if math.isnan(low):
            return UNDECIDED
        is_small = -self.matters <= low and high <= self.matters
        if self.side == "same":
            is_large = low > self.matters or high < -self.matters
            return APPEARS if is_small else NOT if is_large else UNDECIDED
        if value.excludes_zero:
            return APPEARS if (low > 0) == (self.side == "higher") else NOT
        return NOT if is_small else UNDECIDED


def claims(sizes: Sizes) -> list[Claim]:
    """Return all claims in the order of the page."""
    return [
        *_averaging(sizes),
        *_enough(sizes),
        *_epochs(sizes),
        *_retention(sizes),
        *_regulariser(sizes),
        *_domains(sizes),
    ]


def _averaging(sizes: Sizes) -> Iterator[Claim]:
    for task in (IN_DOMAIN, *OUTSIDE):
        of = last(FREE, task, sizes)
        gain = Difference(Ensemble(of), MeanMember(of))
        for metric, name, side, matters in _GAINS:
            words = f"{task}: the ensemble's {name} is {side} than a member's"
            yield Claim("averaging", words, gain, metric, side, matters, of.documents)


def _enough(sizes: Sizes) -> Iterator[Claim]:
    of = last(FREE, IN_DOMAIN, sizes)
    whole = sizes.members
    for fewer in range(2, whole):
        added = Difference(Ensemble(of), OfSize(of, fewer))
        words = f"{IN_DOMAIN}: {fewer} members have the nll of {whole}, within .005"
        yield Claim("members", words, added, "nll", "same", 0.005, of.documents)


def _epochs(sizes: Sizes) -> Iterator[Claim]:
    first, middle, end = (by_epoch(FREE, epoch, IN_DOMAIN, sizes) for epoch in EPOCHS)
    n = end.documents
    over = Difference(MeanMember(end), MeanMember(middle))
    yield Claim(
        "overfitting", f"a member's nll rises from epoch {MIDDLE} to {END}", over, "nll", "higher", 0.01, n
    )
    words = f"a member's accuracy stays from epoch {MIDDLE} to {END}, within .03"
    yield Claim("overfitting", words, over, "accuracy", "same", 0.03, n)
    whole = Difference(Ensemble(end), Ensemble(first))
    words = f"the ensemble's entropy falls from epoch {FIRST} to {END}"
    yield Claim("epochs", words, whole, "predictive_entropy", "lower", 0.02, n)
    words = f"mutual information grows from epoch {FIRST} to {END}"
    yield Claim("epochs", words, whole, "mutual_information", "higher", 0.002, n)
    gains = Difference(_gain(end), _gain(first))
    words = f"what averaging gains in nll grows from epoch {FIRST} to {END}"
    yield Claim("epochs", words, gains, "nll", "lower", 0.005, n)


def _retention(sizes: Sizes) -> Iterator[Claim]:
    for task in (IN_DOMAIN, *OUTSIDE):
        middle, end = (by_epoch(FREE, epoch, task, sizes) for epoch in (MIDDLE, END))
        words = (
            f"{task}: as many of the prior's right answers are kept at epoch {END} as at {MIDDLE}, within .05"
        )
        yield Claim(
            "retention", words, Difference(Kept(end), Kept(middle)), "kept", "same", 0.05, end.documents
        )


def _regulariser(sizes: Sizes) -> Iterator[Claim]:
    free, penalised = (last(penalty, IN_DOMAIN, sizes) for penalty in PENALTIES)
    whole = Difference(Ensemble(penalised), Ensemble(free))
    from_prior = Difference(Kept(penalised), Kept(free))
    n = free.documents
    topic = "regulariser"
    yield Claim(topic, "λ = 1 lowers mutual information", whole, "mutual_information", "lower", 0.002, n)
    yield Claim(
        topic,
        "λ = 1 keeps the ensemble nearer to the prior (KL)",
        from_prior,
        "kl_to_prior",
        "lower",
        0.02,
        n,
    )
    yield Claim(topic, "λ = 1 keeps more of the prior's right answers", from_prior, "kept", "higher", 0.02, n)
    yield Claim(topic, "λ = 1 lowers the ensemble's nll", whole, "nll", "lower", 0.01, n)
    yield Claim(topic, "λ = 1 lowers the ensemble's ece", whole, "ece", "lower", 0.01, n)


def _domains(sizes: Sizes) -> Iterator[Claim]:
    # letters are not held against texts: five of them have more entropy than four for their number alone
    for task in (*OUTSIDE, *WRITTEN):
        of = last(FREE, task, sizes)
        told = Detected(of)
        for score, name in (("entropy", "entropy"), ("mutual_information", "mutual information")):
            words = f"{task}: {name} is higher than on {IN_DOMAIN} (AUROC − ½)"
            yield Claim("out of domain", words, told, f"{score}/auroc", "higher", 0.05, of.documents)
    for task in OUTSIDE:
        first, end = (by_epoch(FREE, epoch, task, sizes) for epoch in (FIRST, END))
        words = f"{task}: mutual information grows from epoch {FIRST} to {END}"
        grown = Difference(Ensemble(end), Ensemble(first))
        yield Claim("out of domain", words, grown, "mutual_information", "higher", 0.002, end.documents)


def _gain(of: Of) -> Measure:
    return Difference(Ensemble(of), MeanMember(of))
