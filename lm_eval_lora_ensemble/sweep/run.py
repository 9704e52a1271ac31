"""The sweep itself: one backend, its members exchanged for every epoch, lm-eval's files for each."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lm_eval_lora_ensemble.disk import IN_PROGRESS
from lm_eval_lora_ensemble.ensemble.members import Ensemble
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.arguments import DEVICE
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.harness.plugin import MODEL_NAME
from lm_eval_lora_ensemble.sweep.plan import SweepPlan


def sweep(
    plan: SweepPlan,
    ensembles: Mapping[int, Ensemble],
    output: Path,
    *,
    device: str = DEVICE,
    batch_size: str = "auto",
    include_path: str | None = None,
) -> Iterator[tuple[int, Path]]:
    """Evaluate every epoch that ``output`` does not hold yet; yield (epoch, its results folder) when it is there.

    ``output/epoch_XX`` appears in one step when all its tasks are done. Scores of an epoch that was
    interrupted are kept in a cache and not computed again. With several processes all of them score, and the
    first one alone writes, moves and removes.

    Args:
        plan: what to evaluate.
        ensembles: members of every epoch, from :meth:`.SweepPlan.ensembles`.
        output: the sweep's folder; made if there is none, but only once everything else is known to be right.
        device: as lm-eval's.
        batch_size: as lm-eval's.
        include_path: a folder of further tasks.

    Raises:
        EnsembleError: an unknown task, or ``output`` is not this sweep's (:meth:`.SweepPlan.claim`).
    """
    manager = TaskManager(include_path=include_path)
    _check_names(manager, plan.tasks)
    plan.check(output, ensembles)
    missing = {epoch: ensemble for epoch, ensemble in ensembles.items() if not _place(output, epoch).is_dir()}
    yield from ((epoch, _place(output, epoch)) for epoch in ensembles if epoch not in missing)
    if not missing:
        return
    model: LoraEnsembleLM | None = None
    for epoch, ensemble in missing.items():
        if model is None:
            options = {"batch_size": batch_size, "device": device, **(plan.model_args or {})}
            model = LoraEnsembleLM(adapters=plan.adapters, members=plan.members, epoch=epoch, **options)
            plan.claim(output, ensembles)
        else:
            model.change_members(ensemble)
        scratch = output / IN_PROGRESS / _place(output, epoch).name
        results = _evaluate(model, plan, epoch, manager, scratch)
        if model.rank == 0:
            results.replace(_place(output, epoch))
            shutil.rmtree(scratch, ignore_errors=True)
        yield epoch, _place(output, epoch)
    if model is not None and model.rank == 0:
        with contextlib.suppress(OSError):  # an earlier sweep's epoch may wait there
            (output / IN_PROGRESS).rmdir()


def _place(output: Path, epoch: int) -> Path:
    return output / f"epoch_{epoch:02d}"


def _check_names(manager: TaskManager, tasks: tuple[str, ...]) -> None:
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise EnsembleError(f"no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")


def _evaluate(
    model: LoraEnsembleLM, plan: SweepPlan, epoch: int, manager: TaskManager, scratch: Path
) -> Path:
    """Run lm-eval on one epoch; return the folder in ``scratch`` where the first process wrote its files."""
    folder = scratch / "results"
    scratch.mkdir(parents=True, exist_ok=True)
    if model.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    arguments: dict[str, Any] = {
        "pretrained": model.ensemble.base_model,
        "adapters": plan.adapters,
        "epoch": epoch,
        **({"members": plan.members} if plan.members else {}),
        **(plan.model_args or {}),
    }
    tracker = EvaluationTracker(output_path=str(folder))
    results = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(plan.tasks),
        num_fewshot=plan.num_fewshot,
        limit=plan.limit,
        use_cache=str(scratch / "scores"),
        evaluation_tracker=tracker,
        task_manager=manager,
    )
    if results is None:  # not the first process, which writes for all
        return folder
    results["config"]["model"] = MODEL_NAME
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    return folder
