"""Every metric of the battery from its definition, by other people's code, document by document.

Nothing of the package is imported: scikit-learn, scipy, torchmetrics and pandas, and loops where no library
has the metric.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
import torchmetrics.functional.classification as torchmetrics

BINS = 15


@dataclass
class Document:
    """Loglikelihoods, members by choices, and the gold index."""

    scores: np.ndarray
    gold: int

    @cached_property
    def members(self) -> np.ndarray:
        return scipy.special.softmax(self.scores, axis=1)

    @cached_property
    def mixture(self) -> np.ndarray:
        return self.members.mean(axis=0)

    @property
    def choices(self) -> int:
        return self.scores.shape[1]

    def only(self, member: int) -> Document:
        return Document(self.scores[[member]], self.gold)


def from_samples(path: Path) -> list[Document]:
    """Read a samples file whose targets are indices."""
    lines = [json.loads(line) for line in path.open(encoding="utf-8")]
    lines.sort(key=lambda line: line["doc_id"])
    return [Document(np.array(line["members"]), int(line["target"])) for line in lines]


def battery(documents: list[Document]) -> dict[str, float]:
    """Return all metrics; NaN where one is undefined."""
    return _scores(documents) | _calibration(documents) | _information(documents) | _selection(documents)


def _padded(documents: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    width = max(d.choices for d in documents)
    p = np.array([np.pad(d.mixture, (0, width - d.choices)) for d in documents])
    return p, np.array([d.gold for d in documents])


def _right(documents: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    p, gold = _padded(documents)
    return p.max(axis=1), p.argmax(axis=1) == gold


def _scores(documents: list[Document]) -> dict[str, float]:
    p, gold = _padded(documents)
    one_hot = np.eye(p.shape[1])[gold]
    # log_loss would clip at 2e-16; the logarithm of the mixture is taken in logarithms instead
    nll = [
        math.log(len(d.scores))
        - scipy.special.logsumexp(scipy.special.log_softmax(d.scores, axis=1)[:, d.gold])
        for d in documents
    ]
    return {
        "accuracy": sklearn.metrics.accuracy_score(gold, p.argmax(axis=1)),
        "nll": float(np.mean(nll)),
        "brier_score": sum(
            sklearn.metrics.brier_score_loss(one_hot[:, c], p[:, c]) for c in range(p.shape[1])
        ),
    }


def _torch_error(confidence: np.ndarray, right: np.ndarray, norm: str) -> float:
    # torchmetrics closes bins on the left; only values on an edge (here: certain ones) tell
    inside = torch.tensor(np.clip(confidence, 0, 1 - 1e-9))
    return float(
        torchmetrics.binary_calibration_error(inside, torch.tensor(right).int(), n_bins=BINS, norm=norm)
    )


def _bins(confidence: np.ndarray, right: np.ndarray, edges: np.ndarray) -> pd.DataFrame:
    """Return n, mean confidence and frequency of every bin that holds a document."""
    table = pd.DataFrame({"confidence": confidence, "right": right.astype(float)})
    groups = table.groupby(pd.cut(table["confidence"], edges, include_lowest=True), observed=True)
    found = groups.mean()
    found["n"] = groups.size()
    return found


def _calibration(documents: list[Document]) -> dict[str, float]:
    p, gold = _padded(documents)
    n, (confidence, right) = len(documents), _right(documents)
    widths = np.linspace(0, 1, BINS + 1)
    equal = _bins(confidence, right, widths)
    several = equal[equal["n"] > 1]
    noise = several["right"] * (1 - several["right"]) / (several["n"] - 1)
    squared = ((several["right"] - several["confidence"]) ** 2 - noise) * several["n"] / n
    quantiles = np.quantile(confidence, np.arange(1, BINS) / BINS, method="inverted_cdf")
    mass = _bins(confidence, right, np.unique([0, *quantiles[quantiles < 1], 1]))
    classwise, reliability, resolution, uncertainty = [], 0.0, 0.0, 0.0
    for c in range(p.shape[1]):
        has = np.array([d.choices > c for d in documents])
        is_gold = gold[has] == c
        classwise.append(_torch_error(p[has, c], is_gold, "l1"))
        table, base = _bins(p[has, c], is_gold, widths), is_gold.mean()
        reliability += (table["n"] * (table["right"] - table["confidence"]) ** 2).sum() / n
        resolution += (table["n"] * (table["right"] - base) ** 2).sum() / n
        uncertainty += has.sum() * is_gold.var() / n
    within = _scores(documents)["brier_score"] - reliability + resolution - uncertainty
    return {
        "brier_reliability": float(reliability),
        "brier_resolution": float(resolution),
        "brier_uncertainty": float(uncertainty),
        "brier_within_bin": float(within),
        "ece": _torch_error(confidence, right, "l1"),
        "ece_equal_mass": float((mass["n"] / n * (mass["right"] - mass["confidence"]).abs()).sum()),
        "rms_ce": _torch_error(confidence, right, "l2"),
        "mce": _torch_error(confidence, right, "max"),
        "squared_ce_debiased": float(squared.sum()),
        "classwise_ece": float(np.mean(classwise)),
        "confidence": float(confidence.mean()),
        "confidence_gap": float(confidence.mean() - right.mean()),
    }


def entropies(documents: list[Document]) -> dict[str, np.ndarray]:
    """Return what ranks documents, by score: higher is less certain."""
    divergence = [scipy.special.rel_entr(d.members, d.mixture).sum(axis=1).mean() for d in documents]
    return {
        "max_probability": np.array([1 - d.mixture.max() for d in documents]),
        "entropy": np.array([scipy.stats.entropy(d.mixture) for d in documents]),
        "expected_entropy": np.array([scipy.stats.entropy(d.members, axis=1).mean() for d in documents]),
        "mutual_information": np.array(divergence),
    }


def _information(documents: list[Document]) -> dict[str, float]:
    found = entropies(documents)
    per_document = {
        "predictive_entropy": found["entropy"],
        "expected_entropy": found["expected_entropy"],
        "mutual_information": found["mutual_information"],
    }
    logs = np.log([d.choices for d in documents])
    pairs = list(itertools.combinations(range(len(documents[0].scores)), 2))
    votes = [d.members.argmax(axis=1) for d in documents]
    agree = [[v[i] == v[j] for i, j in pairs] for v in votes]
    distance = [[np.abs(d.members[i] - d.members[j]).sum() / 2 for i, j in pairs] for d in documents]
    both_ways = [*pairs, *((j, i) for i, j in pairs)]
    first, second = [i for i, _ in both_ways], [j for _, j in both_ways]
    kl = [scipy.special.rel_entr(d.members[first], d.members[second]).sum(axis=1) for d in documents]

    def mean(rows: list[list[float]]) -> float:
        return float(np.mean(rows)) if pairs else math.nan

    return {
        **{name: float(values.mean()) for name, values in per_document.items()},
        **{f"{name}_normalised": float((values / logs).mean()) for name, values in per_document.items()},
        "variation_ratio": float(
            np.mean([1 - Counter(v.tolist()).most_common(1)[0][1] / len(v) for v in votes])
        ),
        "pairwise_agreement": mean(agree),
        "pairwise_total_variation": mean(distance),
        "pairwise_kl": mean(kl),
    }


def _selection(documents: list[Document]) -> dict[str, float]:
    wrong, scores = ~_right(documents)[1], entropies(documents)
    n = len(documents)
    ideal = float(np.mean([np.sort(wrong)[:k].mean() for k in range(1, n + 1)]))
    values = {}
    for name in ("max_probability", "entropy", "mutual_information"):
        score = scores[name]
        area = float(np.mean(_risks(score, wrong)))
        one_class = len(set(wrong.tolist())) == 1
        values[f"error_auroc_{name}"] = math.nan if one_class else sklearn.metrics.roc_auc_score(wrong, score)
        values[f"error_aupr_{name}"] = (
            math.nan if one_class else sklearn.metrics.average_precision_score(wrong, score)
        )
        values[f"aurc_{name}"] = area
        values[f"excess_aurc_{name}"] = area - ideal
        if len(documents[0].scores) == 1 and name == "mutual_information":
            values.update({key: math.nan for key in values if key.endswith("mutual_information")})
    thresholds = scores["max_probability"]
    risks = _risks(thresholds, wrong)
    for coverage in (50, 80, 90):
        values[f"accuracy_at_{coverage}_coverage"] = 1 - risks[math.ceil(coverage * n / 100) - 1]
    accepted = [thresholds <= t for t in thresholds]
    values["coverage_at_5_risk"] = max((a.mean() for a in accepted if wrong[a].mean() <= 0.05), default=0.0)
    return values


def _risks(score: np.ndarray, wrong: np.ndarray) -> list[float]:
    """Return the error rate among the k most certain for every k, as the mean over all orders of equals."""
    table = pd.DataFrame({"score": score, "wrong": wrong.astype(float)}).sort_values("score", kind="stable")
    expected = table.groupby("score")["wrong"].transform("mean")
    return (expected.cumsum() / np.arange(1, len(table) + 1)).tolist()


def detection(inside: list[Document], outside: list[Document]) -> dict[str, dict[str, float]]:
    """Return AUROC, AUPR and FPR95 of every score, out-of-domain positive."""
    truth = [0] * len(inside) + [1] * len(outside)
    first, second = entropies(inside), entropies(outside)
    found = {}
    for name in first:
        score = np.concatenate([first[name], second[name]])
        fpr, tpr, _ = sklearn.metrics.roc_curve(truth, score, drop_intermediate=False)
        found[name] = {
            "auroc": sklearn.metrics.roc_auc_score(truth, score),
            "aupr": sklearn.metrics.average_precision_score(truth, score),
            "fpr95": float(fpr[np.argmax(tpr >= 0.95)]),
        }
    return found


def temperature(documents: list[Document]) -> float:
    """Return the temperature of least nll of the ensemble's distribution, by golden-section search."""
    logs = [np.log(d.mixture) for d in documents]

    def loss(log_t: float) -> float:
        scaled = [scipy.special.log_softmax(v / math.exp(log_t)) for v in logs]
        return -float(np.mean([s[d.gold] for s, d in zip(scaled, documents, strict=True)]))

    return math.exp(scipy.optimize.minimize_scalar(loss, bracket=(-1, 1), method="golden").x)


def scaled(documents: list[Document], t: float) -> list[Document]:
    """Return one-member documents with the pool's log-probabilities divided by ``t``."""
    return [Document(np.log(d.mixture)[None] / t, d.gold) for d in documents]


# ------------------------------------------------------------------------- scores per length, several golds


def fold(line: dict) -> int:
    """Return the part of a cross-fit that a logged sample belongs to."""
    return int(line["doc_hash"][:8], 16) % 5


def _mixture_nll(log_t: float, scores: np.ndarray, golds: np.ndarray) -> float:
    """Return mean −log of the golds' mass under the members' mean at T = exp(log_t); scores (N, D, C)."""
    p = scipy.special.softmax(scores / math.exp(log_t), axis=2)
    with np.errstate(divide="ignore"):
        return -float(np.log((p.mean(axis=0) * golds).sum(axis=1)).mean())


def mixture_temperature(scores: list[np.ndarray], golds: list[list[int]]) -> float:
    """Return the T of least mixture nll for documents' (N, C) scores: a fine grid, then Brent."""
    width = max(s.shape[1] for s in scores)
    padded = np.stack(
        [np.pad(s, ((0, 0), (0, width - s.shape[1])), constant_values=-np.inf) for s in scores], axis=1
    )
    is_gold = np.array([[c in g for c in range(width)] for g in golds])
    grid = np.arange(-7, 4.6, 0.1)
    losses = [_mixture_nll(t, padded, is_gold) for t in grid]
    best = int(np.argmin(losses))
    assert 0 < best < len(grid) - 1, "no minimum inside the grid"
    bracket = (grid[best - 1], grid[best], grid[best + 1])
    found = scipy.optimize.minimize_scalar(
        _mixture_nll, bracket=bracket, args=(padded, is_gold), method="brent", tol=1e-12
    )
    return math.exp(found.x)


def crossfitted(lines: list[dict], choices: str = "choices") -> tuple[list[Document], list[float]]:
    """Return logged samples' documents of scores per character over T, and T from the other folds' documents."""
    scores = [np.array(s["members"]) / [len(text) for text in s["doc"][choices]] for s in lines]
    golds = [s["golds"] for s in lines]
    of_fold = {}
    for k in {fold(s) for s in lines}:
        others = [i for i, s in enumerate(lines) if fold(s) != k]
        of_fold[k] = mixture_temperature([scores[i] for i in others], [golds[i] for i in others])
    temperatures = [of_fold[fold(s)] for s in lines]
    documents = [Document(s / t, g[0]) for s, t, g in zip(scores, temperatures, golds, strict=True)]
    return documents, temperatures


def of_several_golds(documents: list[Document], golds: list[list[int]]) -> dict[str, float]:
    """Return what several right choices change."""
    nll, brier, right, confidence = [], [], [], []
    for document, those in zip(documents, golds, strict=True):
        p = document.mixture
        mass = sum(p[g] for g in those)
        nll.append(-math.log(mass))
        brier.append((1 - mass) ** 2 + sum(q**2 for c, q in enumerate(p) if c not in those))
        right.append(int(np.argmax(p)) in those)
        confidence.append(p.max())
    return {
        "nll": float(np.mean(nll)),
        "brier_score": float(np.mean(brier)),
        "accuracy": float(np.mean(right)),
        "ece": _torch_error(np.array(confidence), np.array(right), "l1"),
    }
