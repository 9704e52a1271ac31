"""The tables of docs/study.md: between its markers, from the results of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stepwise.page import filled as fill
from stepwise.page import shown, table, time_and_machine

from lm_eval_lora_ensemble.analysis.distribution import Distribution
from lm_eval_lora_ensemble.report.leaderboard import display
from overfitting_study.claims import END, FREE, OUTSIDE, claims
from overfitting_study.figure import NAME, has_something
from overfitting_study.plan import EPOCHS, FOREIGN, IN_DOMAIN, PENALTIES, PRIOR, evaluation_of, steps
from overfitting_study.results import (
    MEASURED,
    OF_MEMBERS,
    PRIMARY,
    VIEWS,
    Detected,
    Ensemble,
    Kept,
    MeanMember,
    Measure,
    OfSize,
    Study,
    by_epoch,
    last,
)

PAGE = Path(__file__).resolve().parents[2] / "study.md"
HEADS = {"brier_score": "Brier", "predictive_entropy": "entropy", OF_MEMBERS: "MI"}
RETAINED = ("kept", "gained", "agreement", "total_variation", "kl_to_prior")
SCORES = ("max_probability", "entropy", "expected_entropy", OF_MEMBERS)


def filled(page: str, study: Study | None) -> str:
    """Return the page with every block between its markers as the results have it; None is no results."""

    def made(block: Callable[[Study], str]) -> Callable[[], str]:
        return lambda: block(study) if study else ""

    return fill(page, "overfitting", {name: made(of) for name, of in BLOCKS.items()})


def what_was_run(study: Study) -> str:
    """Return sizes, machine and time, and how many seeds there are of each λ."""
    if not study.records:
        return ""
    sizes = study.sizes
    end = ", ".join(f"{task} {n}" for task, n in {**sizes.last, **sizes.foreign}.items())
    earlier = ", ".join(f"{task} {n}" for task, n in sizes.earlier.items())
    seeds = {penalty: _seeds(study, penalty) for penalty in PENALTIES}
    done = ", ".join(f"λ = {penalty}: {n} of {sizes.seeds}" for penalty, n in seeds.items())
    lines = [
        *(["**A trial: its numbers say nothing.**", ""] if sizes.is_trial else []),
        f"* Ensembles of {sizes.members} that are evaluated whole: {done}.",
        f"* Documents at epoch {END} and of the prior: {end}.",
        f"* At epochs {' and '.join(map(str, EPOCHS[:-1]))}: {earlier}; comparisons of epochs use these.",
        f"* Trained on {sizes.trained_on} questions, {sizes.dtype}; each epoch's temperature is from "
        f"{sizes.validated_on} questions of {IN_DOMAIN}'s validation split.",
        *time_and_machine(steps(sizes), study.records),
    ]
    return "\n".join(lines) + "\n"


def claimed(study: Study) -> str:
    """Return every claim with its number under each view, and the verdict of the first."""
    text = []
    every = claims(study.sizes)
    for topic in dict.fromkeys(claim.topic for claim in every):
        rows = []
        for claim in (one for one in every if one.topic == topic):
            judged = study.judge(claim.measure, PRIMARY)
            if judged is None or claim.metric not in judged.metrics:
                continue
            beside = [_value(study, claim.measure, claim.metric, view) for view in VIEWS[1:]]
            value = judged.value(claim.metric)
            n = f"{claim.documents} × {len(judged.by_seed)}"
            verdict = f"**{claim.verdict(value)}**"
            rows.append([claim.words, verdict, shown(value), *beside, display(claim.matters), n])
        if rows:
            head = [topic, "verdict", *_views(), "matters", "documents × seeds"]
            text.append(table(head, rows))
    return "\n".join(text)


def epochs(study: Study) -> str:
    """Return the in-domain metrics of one member and of all, by λ and epoch."""
    measured = (*MEASURED, OF_MEMBERS)
    rows = []
    for penalty in PENALTIES:
        for epoch in EPOCHS:
            of = by_epoch(penalty, epoch, IN_DOMAIN, study.sizes)
            for size, measure in ((1, MeanMember(of)), (study.sizes.members, Ensemble(of))):
                if study.judge(measure, PRIMARY):
                    label = f"λ = {penalty}, epoch {epoch}, M = {size}"
                    rows.append([label, *(_value(study, measure, metric) for metric in measured)])
    prior = by_epoch(FREE, PRIOR, IN_DOMAIN, study.sizes)
    if study.judge(Ensemble(prior), PRIMARY):
        rows.insert(0, ["prior", *(_value(study, Ensemble(prior), metric) for metric in measured)])
    return table(["", *(HEADS.get(metric, metric) for metric in measured)], rows) if rows else ""


def members(study: Study) -> str:
    """Return the in-domain metrics by number of members at the last epoch."""
    measured = MEASURED[:4]
    of = last(FREE, IN_DOMAIN, study.sizes)
    if not study.judge(Ensemble(of), PRIMARY):
        return ""
    rows = [
        [f"M = {size}", *(_value(study, OfSize(of, size), metric) for metric in measured)]
        for size in range(1, study.sizes.members + 1)
    ]
    return table(["", *(HEADS.get(metric, metric) for metric in measured)], rows)


def retained(study: Study) -> str:
    """Return what is left of the prior, by task, λ and epoch."""
    rows = []
    for task in (IN_DOMAIN, *OUTSIDE):
        for penalty in PENALTIES:
            for epoch in EPOCHS:
                measure = Kept(by_epoch(penalty, epoch, task, study.sizes))
                if study.judge(measure, PRIMARY):
                    label = f"{task}, λ = {penalty}, epoch {epoch}"
                    rows.append([label, *(_value(study, measure, name) for name in RETAINED)])
    return (
        table(["", "kept", "gained", "agreement", "total variation", "KL to the prior"], rows) if rows else ""
    )


def detected(study: Study) -> str:
    """Return AUROC minus ½ of every score for every task, at the last epoch."""
    rows = []
    for penalty in PENALTIES:
        for task in (*OUTSIDE, *FOREIGN):
            measure = Detected(last(penalty, task, study.sizes))
            if study.judge(measure, PRIMARY):
                cells = [_value(study, measure, f"{score}/auroc") for score in SCORES]
                rows.append([f"{task}, λ = {penalty}", *cells])
    head = ["AUROC − ½", "1 − max p", "entropy", "expected entropy", "MI"]
    return table(head, rows) if rows else ""


def figure(study: Study) -> str:
    """Return the figure's line, where there is something to draw."""
    words = "nll, ece and mutual information on ARC-Easy by epoch; AUROC of entropy and mutual information by task"
    return f"![{words}]({NAME})\n" if has_something(study) else ""


BLOCKS: Mapping[str, Callable[[Study], str]] = {
    "run": what_was_run,
    "claims": claimed,
    "figure": figure,
    "epochs": epochs,
    "members": members,
    "retention": retained,
    "detection": detected,
}


def _views() -> Sequence[str]:
    return ["per character, T from validation", "summed, T = 1", "per character, oracle"]


def _value(study: Study, measure: Measure, metric: str, view: Distribution = PRIMARY) -> str:
    judged = study.judge(measure, view)
    return shown(judged.value(metric)) if judged and metric in judged.metrics else "–"


def _seeds(study: Study, penalty: str) -> int:
    """Return how many ensembles have every evaluation of every epoch."""
    return sum(
        all(
            evaluation_of(penalty, seed, epoch, task, documents) in study.records
            for epoch in EPOCHS
            for task, documents in study.sizes.documents(epoch).items()
        )
        for seed in range(study.sizes.seeds)
    )
