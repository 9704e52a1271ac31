"""The results that belong on a card: those of this ensemble's own members, and of no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.analysis.arguments import primary_distribution, under
from lm_eval_lora_ensemble.analysis.distribution import Distribution
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.run import Run, merge_runs
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.analysis.strings import StringResult, evaluate_strings
from lm_eval_lora_ensemble.ensemble.adapters.folder import CONFIG, WEIGHTS, adapter_sha256
from lm_eval_lora_ensemble.ensemble.manifest import Manifest
from lm_eval_lora_ensemble.ensemble.members import Ensemble, same_model
from lm_eval_lora_ensemble.errors import EnsembleError, one_line
from lm_eval_lora_ensemble.metrics.bootstrap import ResamplingPlan
from lm_eval_lora_ensemble.report.answers import Answers, make_answers
from lm_eval_lora_ensemble.report.entries import make_entries
from lm_eval_lora_ensemble.report.leaderboard import Board, leaderboard


@dataclass(frozen=True, eq=False)
class RunResults:
    """What one run says of the ensemble.

    Attributes:
        run: the run, under the distribution that is judged.
        boards: the top-level tasks and groups of choices, each with one run's rows.
        strings: tasks of whole strings by name.
        answers: of tasks of generated texts; None without any.
    """

    run: Run
    boards: list[Board]
    strings: dict[str, StringResult]
    answers: Answers | None

    @property
    def scored(self) -> Mapping[str, Any]:
        """What the results file says of the model that was scored."""
        found: Mapping[str, Any] = self.run.config["lora_ensemble"]
        return found

    def shots(self, task: str) -> int | None:
        """Return the examples in front of each document, where the results file says so for all of a group's tasks."""
        leaves = self.run.leaves(task) if task in self.run else (task,)
        found = {self.run.task_configs.get(leaf, {}).get("num_fewshot") for leaf in leaves}
        (first, *others) = found
        return first if not others and isinstance(first, int) and not isinstance(first, bool) else None

    def title(self, task: str) -> str:
        """Return a task's name, with its shots where they are known."""
        shots = self.shots(task)
        return task if shots is None else f"{task} ({shots}-shot)"


def read_results(places: Sequence[Path], ensemble: Ensemble, listed: Manifest) -> tuple[list[Run], list[str]]:
    """Read the runs of an ensemble's final members.

    Args:
        places: lm-eval's output folders or files.
        ensemble: all members, checked.
        listed: what its manifest says; tells the adapters of earlier epochs.

    Returns:
        The runs, and why others of the same ensemble are left out.

    Raises:
        EnsembleError: a run is of another ensemble, or does not say of which; nothing is left; a task was evaluated
            twice.
    """
    runs: list[Run] = []
    left_out: list[str] = []
    for run in (run for place in dict.fromkeys(places) for run in load_runs(place)):
        reason = _why_not(run, ensemble, listed)
        if reason:
            left_out.append(one_line(f"left out: {run.source} ({run.date[:19]}): {reason}"))
        elif not (run.files and any(run.files == other.files for other in runs)):  # named twice
            runs.append(run)
    if not runs:
        raise EnsembleError(
            f"no results of the ensemble's {len(ensemble.members)} final members; "
            f"{'; '.join(left_out)}; evaluate them with `lm_eval --model lora-ensemble … --log_samples --output_path`"
        )
    return merge_runs(runs), left_out


def evaluate_results(runs: Sequence[Run], asked: Distribution | None, settings: Settings) -> list[RunResults]:
    """Compute what the card shows, every value with its interval.

    Args:
        runs: from :func:`read_results`.
        asked: which distribution over the choices is judged; None as a report chooses it.
        settings: bins, resamples, seed, level.

    Raises:
        EnsembleError: a task was evaluated twice in the same way, or there is nothing with gold answers.
    """
    results = []
    for run in under(runs, asked or primary_distribution(runs)):
        (entry,) = make_entries([run])
        boards = [board for board in leaderboard([entry], settings) if board.top]
        strings = {
            name: evaluate_strings(
                scores,
                ResamplingPlan(scores.n_documents, settings.resamples, settings.seed, level=settings.level),
            )
            for name, scores in run.strings.items()
        }
        results.append(RunResults(run, boards, strings, make_answers([entry], (), settings).get(0)))
    _refuse_twice(results)
    if not any(result.boards or result.strings or result.answers for result in results):
        raise EnsembleError(
            f"{runs[0].source}: no task has gold answers, so there is nothing to show on a card"
        )
    return results


def _refuse_twice(results: Sequence[RunResults]) -> None:
    seen: dict[str, Run] = {}
    for result in results:
        answers = result.answers.results if result.answers else {}
        for task in (*(board.task for board in result.boards), *result.strings, *answers):
            other = seen.setdefault(result.title(task), result.run)
            if other is not result.run:
                raise EnsembleError(
                    f"{result.title(task)} was evaluated twice, in {other.source} ({other.date[:19]}) and "
                    f"{result.run.source} ({result.run.date[:19]}); name the results_*.json of the run to show"
                )


def _why_not(run: Run, ensemble: Ensemble, listed: Manifest) -> str:
    """Say why a run of this ensemble does not belong on its card; empty for one that does.

    Raises:
        EnsembleError: it is not of this ensemble.
    """
    said = run.config.get("lora_ensemble")
    members = said.get("members") if isinstance(said, Mapping) else None
    if not isinstance(said, Mapping) or not isinstance(members, list):
        raise EnsembleError(
            f"{run.source} does not say which adapters it scored (model {run.config.get('model', 'unknown')}); name "
            "results of `lm_eval --model lora-ensemble`, with the results_*.json beside the samples"
        )
    base = str(said.get("base_model"))
    if not same_model(base, ensemble.base_model):
        raise EnsembleError(
            f"{run.source} has results on the base model {base}, and the ensemble is on {ensemble.base_model}; name "
            "results of this ensemble"
        )
    scored = sorted(str(member.get("sha256")) for member in members if isinstance(member, Mapping))
    ours = sorted(member.sha256 for member in ensemble.members)
    if scored == ours:
        return ""
    if not scored:
        return "it scored the base model alone, epoch 0"
    if set(scored) < set(ours):
        return f"it scored {len(scored)} of the ensemble's {len(ours)} members"
    kept = sorted({epoch for entry in listed.members for epoch in entry.epochs})
    for epoch in kept:
        if set(scored) <= _kept_adapters(listed, epoch):
            return f"it scored epoch {epoch}, not the members' final adapters"
    raise EnsembleError(
        f"{run.source} has results of another ensemble ({_named(run)}): its adapters' checksums are not those of this "
        "one's members; name results of this ensemble, or evaluate it again if it was trained anew"
    )


def _kept_adapters(listed: Manifest, epoch: int) -> set[str]:
    """Return the checksums of the members' adapters of an epoch, as loading them would find."""
    found = set()
    for entry in listed.members:
        config, weights = (entry.files.get(f"{entry.epochs.get(epoch)}/{name}") for name in (CONFIG, WEIGHTS))
        if config is not None and weights is not None:
            found.add(adapter_sha256(config, weights))
    return found


def _named(run: Run) -> str:
    said = run.config["lora_ensemble"]
    where = f"adapters={run.series}, " if run.series else ""
    return f"{where}{len(said['members'])} members, fingerprint {str(said.get('fingerprint'))[:12]}"
