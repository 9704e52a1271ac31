"""Saved results of every ensemble and epoch, and what is measured on them; all measures are paired by document."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from stepwise.study import StudyFolder
from stepwise.values import Judged

from lm_eval_lora_ensemble.analysis.distribution import CROSSFIT, RAW, Distribution
from lm_eval_lora_ensemble.analysis.domains import out_of_domain
from lm_eval_lora_ensemble.analysis.run import Run, merge_runs
from lm_eval_lora_ensemble.analysis.runs import load_samples
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import Bootstrapped, ResamplingPlan, bootstrap, mean_of
from lm_eval_lora_ensemble.metrics.detection import AnswerForm, DetectionStatistics
from lm_eval_lora_ensemble.metrics.predictions import Predictions, check_same_documents
from lm_eval_lora_ensemble.metrics.retention import retention
from overfitting_study.plan import EPOCHS, IN_DOMAIN, PRIOR, VALIDATION, Sizes, evaluation_of

PRIMARY = Distribution("chars", VALIDATION)
RAW_SUMS, ORACLE = Distribution("sum", RAW), Distribution("chars", CROSSFIT)
VIEWS = (PRIMARY, RAW_SUMS, ORACLE)

MEASURED = ("accuracy", "nll", "ece", "brier_score", "predictive_entropy")
OF_MEMBERS = "mutual_information"


class NotThereError(EnsembleError):
    """A measure needs results that are not there yet, or a scale that its documents do not define."""


@dataclass(frozen=True)
class Of:
    """One trained ensemble at one epoch on the first documents of one task.

    Attributes:
        penalty: λ.
        epoch: 0 is the prior.
        task: its name.
        documents: the first so many.
    """

    penalty: str
    epoch: int
    task: str
    documents: int


class Measure(Protocol):
    """What gives values by name, under all resamples; equal measures are taken once."""

    def __call__(self, study: Study, seed: int, view: Distribution, /) -> Bootstrapped:
        """Return the values of one seed's ensembles.

        Raises:
            NotThereError: results that it needs.
        """


@dataclass(frozen=True)
class Study(StudyFolder[Sizes]):
    """A study's folder, and what is measured in it."""

    def judge(self, measure: Measure, view: Distribution) -> Judged | None:
        """Return a measure for every seed that has what it needs; None where none has, or the view is undefined."""
        found = {}
        is_prior = isinstance(measure, Ensemble) and measure.of.epoch == PRIOR  # one, whatever was trained
        for seed in range(1 if is_prior else self.sizes.seeds):
            try:
                found[seed] = self.measured(measure, seed, view)
            except NotThereError:  # noqa: PERF203 - the other seeds count
                continue
        return Judged(found, self.settings) if found else None

    def measured(self, measure: Measure, seed: int, view: Distribution) -> Bootstrapped:
        """Return a measure of one seed.

        Raises:
            NotThereError: as the measure.
        """
        key = measure, seed, view
        if key not in self._measured:
            self._measured[key] = measure(self, seed, view)
        return self._measured[key]

    def predictions(self, of: Of, seed: int, view: Distribution) -> Predictions:
        """Return distributions over the choices.

        Raises:
            NotThereError: this was not evaluated yet, or the view has no scale for the task.
            EnsembleError: other documents than another epoch, seed or λ was judged on.
        """
        key = of, seed, view
        if key not in self._predictions:
            judged = self.under(of, seed, view)
            if of.task not in judged:
                raise NotThereError(judged.skipped.get(of.task, f"{of.task} was not evaluated yet"))
            found = judged.predictions(of.task).take(np.arange(of.documents))
            check_same_documents(self._documents.setdefault((of.task, of.documents), found), found)
            self._predictions[key] = found
        return self._predictions[key]

    def under(self, of: Of, seed: int, view: Distribution) -> Run:
        """Return all tasks of an epoch under a view.

        Raises:
            NotThereError: nothing of it was evaluated yet, or the view has no scale for any task.
        """
        run = self.run(of.penalty, seed, of.epoch)
        if (run, view) not in self._under:
            try:
                self._under[run, view] = run.under(view)
            except EnsembleError as error:
                raise NotThereError(str(error)) from error
        return self._under[run, view]

    def run(self, penalty: str, seed: int, epoch: int) -> Run:
        """Return what is there of an epoch's tasks as one run.

        Raises:
            NotThereError: nothing of it was evaluated yet.
        """
        names = [
            name
            for task, documents in self.sizes.documents(epoch).items()
            if (name := evaluation_of(penalty, seed, epoch, task, documents)) in self.records
        ]
        if not names:
            raise NotThereError(f"λ = {penalty}, seed {seed}, epoch {epoch} was not evaluated yet")
        key = ("", 0, PRIOR) if epoch == PRIOR else (penalty, seed, epoch)
        if key not in self._runs:
            (self._runs[key],) = merge_runs([self._load(name) for name in names])
        return self._runs[key]

    def _load(self, name: str) -> Run:
        # the prior's runs are one model's by the place of its adapters, and the folder may have moved between them
        run, place = load_samples(self.output / name), self.records[name].adapters
        return replace(
            run, config={**run.config, "model_args": {**run.config["model_args"], "adapters": place}}
        )

    @cached_property
    def _measured(self) -> dict[tuple[Measure, int, Distribution], Bootstrapped]:
        return {}

    @cached_property
    def _under(self) -> dict[tuple[Run, Distribution], Run]:
        return {}

    @cached_property
    def _runs(self) -> dict[tuple[str, int, int], Run]:
        return {}

    @cached_property
    def _documents(self) -> dict[tuple[str, int], Predictions]:
        return {}

    @cached_property
    def _predictions(self) -> dict[tuple[Of, int, Distribution], Predictions]:
        return {}


@dataclass(frozen=True)
class Ensemble:
    """The mixture of all members."""

    of: Of

    def __call__(self, study: Study, seed: int, view: Distribution) -> Bootstrapped:
        """Return every metric."""
        return _battery(study, self.of, study.predictions(self.of, seed, view))


@dataclass(frozen=True)
class MeanMember:
    """Each member alone, on its own scale; the mean over them."""

    of: Of

    def __call__(self, study: Study, seed: int, view: Distribution) -> Bootstrapped:
        """Return every metric that one member has."""
        whole = study.predictions(self.of, seed, view)
        return mean_of([_battery(study, self.of, whole.member(m)) for m in range(whole.n_members)])


@dataclass(frozen=True)
class OfSize:
    """The mixtures of so many members, on the scale of the whole; the mean over all subsets."""

    of: Of
    members: int

    def __call__(self, study: Study, seed: int, view: Distribution) -> Bootstrapped:
        """Return every metric."""
        whole = study.predictions(self.of, seed, view)
        subsets = itertools.combinations(range(whole.n_members), self.members)
        return mean_of([_battery(study, self.of, whole.only(subset)) for subset in subsets])


@dataclass(frozen=True)
class Kept:
    """What is left of the prior's answers, see :func:`.retention`."""

    of: Of

    def __call__(self, study: Study, seed: int, view: Distribution) -> Bootstrapped:
        """Return :data:`.retention.MEASURES`."""
        prior = study.predictions(replace(self.of, epoch=PRIOR), seed, view)
        later = study.predictions(self.of, seed, view)
        return bootstrap(retention(prior, later), study.settings.plan(self.of.task, later))


@dataclass(frozen=True)
class Detected:
    """How well uncertainty tells a task's documents from the in-domain ones: AUROC minus ½."""

    of: Of

    def __call__(self, study: Study, seed: int, view: Distribution) -> Bootstrapped:
        """Return a value for every score that ranks documents, as ``entropy/auroc``.

        Mutual information of letters does not compare with that of texts, so it is left out there.
        """
        run = study.under(self.of, seed, view)
        inside = replace(self.of, task=IN_DOMAIN, documents=study.sizes.documents(self.of.epoch)[IN_DOMAIN])
        domains = [study.predictions(inside, seed, view)]
        if not run.has_scores(self.of.task):
            raise NotThereError(f"{self.of.task} was not evaluated yet")
        domains.append(out_of_domain(run, IN_DOMAIN, self.of.task))
        sizes = [domain.n_documents for domain in domains]
        chosen = study.settings
        strata = np.repeat([0, 1], sizes)
        plan = ResamplingPlan(sum(sizes), chosen.resamples, chosen.seed, strata=strata, level=chosen.level)
        found = bootstrap(DetectionStatistics(*domains), plan)
        names = [name for name in found.value if name.endswith("/auroc")]
        forms = [AnswerForm.of(run.scores[task]) for task in (IN_DOMAIN, self.of.task)]
        if len({form.letters for form in forms if form}) > 1:
            names.remove("mutual_information/auroc")
        return Bootstrapped(
            plan,
            {name: found.value[name] - 0.5 for name in names},
            {name: found.resampled[name] - 0.5 for name in names},
            {name: found.jackknife[name] - 0.5 for name in names},
        )


@dataclass(frozen=True)
class Difference:
    """One measure minus another, paired by document and by seed."""

    one: Measure
    other: Measure

    def __call__(self, study: Study, seed: int, view: Distribution) -> Bootstrapped:
        """Return the difference of every value that both have."""
        return study.measured(self.one, seed, view).minus(study.measured(self.other, seed, view))


def last(penalty: str, task: str, sizes: Sizes) -> Of:
    """Return the last epoch on all documents of a task."""
    return Of(penalty, EPOCHS[-1], task, sizes.documents(EPOCHS[-1])[task])


def by_epoch(penalty: str, epoch: int, task: str, sizes: Sizes) -> Of:
    """Return an epoch on the documents that every epoch was evaluated on."""
    return Of(penalty, epoch, task, sizes.earlier[task])


def _battery(study: Study, of: Of, predictions: Predictions) -> Bootstrapped:
    metrics: Sequence[str] = MEASURED if predictions.n_members == 1 else (*MEASURED, OF_MEMBERS)
    plan = study.settings.plan(of.task, predictions)
    return bootstrap(Battery(predictions, study.settings.bins, metrics), plan)
