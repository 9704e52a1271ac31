"""Saved results, judged: every metric of every method on every task, and its paired differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from stepwise.study import StudyFolder
from stepwise.values import Judged

from lm_eval_lora_ensemble.analysis.distribution import CROSSFIT, RAW, VALIDATION, Distribution
from lm_eval_lora_ensemble.analysis.domains import out_of_domain
from lm_eval_lora_ensemble.analysis.run import Run, merge_runs
from lm_eval_lora_ensemble.analysis.runs import load_samples
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import Bootstrapped, ResamplingPlan, bootstrap, mean_of
from lm_eval_lora_ensemble.metrics.detection import DetectionStatistics
from lm_eval_lora_ensemble.metrics.predictions import Predictions, check_same_documents
from lm_eval_lora_ensemble.metrics.registry import METRICS
from posterior_study.methods import IN_DOMAIN, METHODS, POINT
from posterior_study.plan import Sizes, drawing_of, evaluation_of, source_of

PRIMARY = Distribution("chars", VALIDATION)
BESIDE = (Distribution("sum", RAW), Distribution("chars", CROSSFIT))
JUDGED = ("accuracy", "nll", "ece", "brier_score", "mutual_information", "error_auroc_entropy")
AVERAGED = ("nll", "brier_score", "ece")
DETECTION = "entropy/auroc"


@dataclass(frozen=True)
class Study(StudyFolder[Sizes]):
    """A study's folder, and what is measured in it."""

    def seeds(self, members: int) -> list[int]:
        """Return the seeds that a number of members is asked for with."""
        return [seed for n, seed in self.sizes.columns() if n == members]

    @property
    def methods(self) -> list[str]:
        """Names in the order of the tables."""
        return [name for name in METHODS if name in self.sizes.methods]

    def judge(self, members: int, task: str, distribution: Distribution) -> dict[str, Judged]:
        """Return every method that has results of a task, by name.

        Raises:
            EnsembleError: results that cannot be trusted, of other documents for one method than for another, or
                without such a distribution.
        """

        def of_one(run: Run) -> Bootstrapped:
            predictions = run.under(distribution).predictions(task)
            alone = predictions.n_members == 1
            metrics = [metric for metric in JUDGED if not (alone and metric == "mutual_information")]
            plan = self.settings.plan(task, predictions)
            return bootstrap(Battery(predictions, self.settings.bins, metrics), plan)

        key = members, task, distribution
        if key not in self._judged:
            self._judged[key] = self._each(self._runs(members, task), of_one)
        return self._judged[key]

    def averaging(self, members: int, task: str) -> dict[str, Judged]:
        """Return what each method of several members gains over its own mean member, under the primary view."""

        def of_one(run: Run) -> Bootstrapped:
            predictions = run.under(PRIMARY).predictions(task)
            plan = self.settings.plan(task, predictions)

            def judged(of: Predictions) -> Bootstrapped:
                return bootstrap(Battery(of, self.settings.bins, AVERAGED), plan)

            alone = [judged(predictions.member(m)) for m in range(predictions.n_members)]
            return judged(predictions).minus(mean_of(alone))

        several = {name: runs for name, runs in self._runs(members, task).items() if name != POINT}
        key = members, task, "averaging"
        if key not in self._judged:
            self._judged[key] = self._each(several, of_one)
        return self._judged[key]

    def detect(self, members: int, task: str) -> dict[str, Judged]:
        """Return how well each method's entropy tells a task from the in-domain one, under the primary view."""
        inside = self._runs(members, IN_DOMAIN)
        both = {
            name: {
                seed: merge_runs([inside[name][seed], run])[0]
                for seed, run in by_seed.items()
                if seed in inside[name]
            }
            for name, by_seed in self._runs(members, task).items()
        }

        def of_one(run: Run) -> Bootstrapped:
            judged, chosen = run.under(PRIMARY), self.settings
            domains = judged.predictions(IN_DOMAIN), out_of_domain(judged, IN_DOMAIN, task)
            sizes = [domain.n_documents for domain in domains]
            strata = np.repeat([0, 1], sizes)
            plan = ResamplingPlan(
                sum(sizes), chosen.resamples, chosen.seed, strata=strata, level=chosen.level
            )
            return bootstrap(DetectionStatistics(*domains), plan)

        key = members, task, DETECTION
        if key not in self._judged:
            self._judged[key] = self._each(both, of_one)
        return self._judged[key]

    def cost(self, members: int, name: str, seed: int) -> dict[str, tuple[float, bool]] | None:
        """Return what a method took: seconds of work for training, drawing and evaluating, and whether each is a bound.

        None while a step is missing. Evaluating is all tasks', each with lm-eval's start.
        """
        method = METHODS[name]
        parts = {
            "training": [source_of(method, members, seed)],
            "drawing": [drawing_of(method, members, seed)] if method.is_drawn else [],
            "evaluation": [
                evaluation_of(method, members, seed, *pair) for pair in self.sizes.documents.items()
            ],
        }
        if any(step not in self.records for steps in parts.values() for step in steps):
            return None
        return {
            part: (
                sum(self.records[step].cost for step in steps),
                any(self.records[step].interrupted for step in steps),
            )
            for part, steps in parts.items()
        }

    def done(self, members: int, name: str, task: str) -> list[int]:
        """Return the seeds that a method has been evaluated with."""
        documents = self.sizes.documents[task]
        return [
            seed
            for seed in self.seeds(members)
            if evaluation_of(METHODS[name], members, seed, task, documents) in self.records
        ]

    def _each(
        self, runs: Mapping[str, Mapping[int, Run]], of_one: Callable[[Run], Bootstrapped]
    ) -> dict[str, Judged]:
        return {
            name: Judged({seed: of_one(run) for seed, run in by_seed.items()}, self.settings)
            for name, by_seed in runs.items()
            if by_seed
        }

    def _runs(self, members: int, task: str) -> dict[str, dict[int, Run]]:
        """Return the runs of one task by method and seed."""
        key = members, task
        if key not in self._read:
            documents = self.sizes.documents[task]
            self._read[key] = {
                name: {
                    seed: load_samples(
                        self.output / evaluation_of(METHODS[name], members, seed, task, documents)
                    )
                    for seed in self.done(members, name, task)
                }
                for name in self.methods
            }
            _refuse_other_documents([run for of in self._read[key].values() for run in of.values()], task)
        return self._read[key]

    @cached_property
    def _judged(self) -> dict[tuple[int, str, Distribution | str], dict[str, Judged]]:
        return {}

    @cached_property
    def _read(self) -> dict[tuple[int, str], dict[str, dict[int, Run]]]:
        return {}


def _refuse_other_documents(runs: Sequence[Run], task: str) -> None:
    for run in runs[1:]:
        check_same_documents(runs[0].predictions(task), run.predictions(task))


def direction_of(metric: str) -> str:
    """Return which end of a metric is better: ``higher``, ``lower`` or neither."""
    return "higher" if metric == DETECTION else METRICS[metric].direction
