"""``lora-ensemble analyse``: the battery for saved runs, as a table and as JSON."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.analysis.answers import AnswerResult
from lm_eval_lora_ensemble.analysis.arguments import (
    add_replicates,
    add_settings,
    asked_distribution,
    read_runs,
    settings_of,
    under,
)
from lm_eval_lora_ensemble.analysis.comparison import (
    Comparison,
    NothingInCommonError,
    compare,
    why_not_compared,
)
from lm_eval_lora_ensemble.analysis.distribution import Distribution
from lm_eval_lora_ensemble.analysis.evaluation import evaluate
from lm_eval_lora_ensemble.analysis.replicates import (
    Replicated,
    Spread,
    evaluate_replicates,
    replicate_sets,
    sharing_members,
)
from lm_eval_lora_ensemble.analysis.result import TaskResult, UncertaintyResult, plain
from lm_eval_lora_ensemble.analysis.run import NothingToAnalyseError, Run
from lm_eval_lora_ensemble.analysis.scales import METRICS_BY_SCALE, ScaleResult, by_scale
from lm_eval_lora_ensemble.disk import write_json
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate
from lm_eval_lora_ensemble.metrics.detection import Detection
from lm_eval_lora_ensemble.metrics.registry import METRICS
from lm_eval_lora_ensemble.metrics.strings import STRING_METRICS

_ARROWS = {"higher": "↑", "lower": "↓", "": ""}

Row = tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="RESULTS",
        help="lm_eval's output folder, a results_*.json or a samples_*.jsonl; further ones of other models "
        "are compared with the first, document by document",
    )
    parser.add_argument(
        "--calibrate", metavar="TASK", help="fit temperatures on this task, apply to the others"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    add_settings(parser)
    add_replicates(parser)
    parser.add_argument(
        "--alpha", type=float, default=0.1, help="error rate of conformal sets (default %(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="print every task of a group, not the group only")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print, write.

    Raises:
        EnsembleError: samples that are missing or cannot be trusted, unknown task names, a JSON file whose
            folder does not exist.
    """
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise EnsembleError(f"--json {arguments.json}: the folder does not exist; create it first")
    if arguments.json is not None and arguments.json.is_dir():
        raise EnsembleError(f"--json {arguments.json} is a folder; name a file")
    settings = settings_of(arguments)
    runs = under(read_runs(arguments), asked_distribution(arguments))
    _check_names(runs, [*arguments.ood, *([arguments.calibrate] if arguments.calibrate else [])])
    output: dict[str, Any] = {"runs": [], "comparisons": [], "replicates": []}
    useless: list[NothingToAnalyseError] = []
    for one in runs:
        try:
            result = evaluate(one, ood=arguments.ood, calibrate=arguments.calibrate, settings=settings)
        except NothingToAnalyseError as error:  # the others are judged all the same
            useless.append(error)
            continue
        shown = one.names() if arguments.all else one.top_level()
        _print_result(result, one.distribution, shown)
        judged = {name: by_scale(one, name, settings) for name in shown if name in one}
        scales = {name: of_task for name, of_task in judged.items() if of_task}
        for name, of_task in scales.items():
            _print_scales(name, of_task, ensemble=one.n_members > 1)
        output["runs"].append(
            {**result.to_dict(), "distribution": plain(one.distribution), "scales": plain(scales)}
        )
    if not output["runs"]:
        raise useless[0]
    for reason in useless:
        print(f"\nleft out: {reason}")
    for other in runs[1:]:
        try:
            compared = compare(other, runs[0], settings)
        except NothingInCommonError as error:
            print(f"\nNot compared: {error}")
            continue
        _print_comparison(other, runs[0], compared)
        output["comparisons"].append(
            {"run": other.source, "baseline": runs[0].source, "tasks": plain(compared)}
        )
    for note in sharing_members(runs):
        print(note)
    for found in replicate_sets(runs, arguments.replicates):
        of_set = [runs[index] for index in found]
        evaluated = evaluate_replicates(of_set, settings)
        _print_replicates(of_set, evaluated, settings.level)
        output["replicates"].append({"runs": [run.source for run in of_set], "tasks": plain(evaluated)})
    if arguments.json is not None:
        write_json(arguments.json, output)
        print(f"Written to {arguments.json}")
    return 0


def _check_names(runs: list[Run], names: Iterable[str]) -> None:
    """Refuse a task that some run lacks; say so if the samples come from different models."""
    for name in names:
        have = [run for run in runs if name in run or name in run.answers]
        lacks = [run for run in runs if run not in have]
        if have and lacks:
            raise EnsembleError(
                f"{name} is in {have[0].source} and not in {lacks[0].source}; samples of different models, "
                "or of models that are unknown because results_*.json is missing, are not put together"
            )


def _print_result(result: UncertaintyResult, distribution: Distribution, shown: list[str]) -> None:
    print(
        f"\n{result.source}: {result.members} member{'s' if result.members > 1 else ''}, "
        f"{result.settings.bins} bins, {result.settings.resamples} resamples, seed {result.settings.seed}, "
        f"{100 * result.settings.level:g} % intervals (BCa; * basic); choices' scores {distribution.label}"
    )
    for name in shown:
        if name in result.tasks:
            _print_task(name, result.tasks[name], ensemble=result.members > 1)
    _print_detection(result.detection)
    for name, recalibrated in result.recalibration.items():
        rows: list[Row] = [
            (
                r.order,
                ", ".join(f"{t:.3g}" for t in r.temperatures) + (" (at limit)" if r.at_limit else ""),
                *(_cell(r.metrics[m]) for m in ("nll", "brier_score", "ece")),
                _cell(r.change["nll"]),
            )
            for r in recalibrated
        ]
        fitted = recalibrated[0].fitted_on
        _table(
            f"{name}, temperature fitted on {fitted}",
            ("order", "T", "nll ↓", "brier ↓", "ece ↓", "nll, change"),
            rows,
        )
    for name, strings in result.strings.items():
        _table(
            f"{name}: {strings.documents} whole strings",
            ("metric", "value", "each member"),
            [
                (
                    f"{metric} {_ARROWS[STRING_METRICS[metric].direction]}".strip(),
                    _cell(estimate),
                    ", ".join(map(_number, strings.members.get(metric, ()))),
                )
                for metric, estimate in strings.metrics.items()
            ],
        )
    for name, by_filter in result.answers.items():
        for filter_key, answers in by_filter.items():
            _print_answers(name if filter_key == "none" else f"{name}, {filter_key}", answers)
    _print_detection(result.answer_detection)
    for name, reason in result.skipped.items():
        print(f"left out: {name}: {reason}")


def _print_detection(detection: Mapping[str, Mapping[str, Mapping[str, Detection]]]) -> None:
    for inside, by_task in detection.items():
        rows: list[Row] = [
            (outside, score, _cell(d.auroc), _cell(d.aupr), _cell(d.fpr95))
            for outside, by_score in by_task.items()
            for score, d in by_score.items()
        ]
        _table(
            f"Out-of-domain detection, in-domain {inside}",
            ("out-of-domain", "score", "AUROC ↑", "AUPR ↑", "FPR95 ↓"),
            rows,
        )
        for outside, by_score in by_task.items():
            for score, d in by_score.items():
                if d.note:
                    print(f"  {outside}, {score}: {d.note}")


def _print_answers(name: str, answers: AnswerResult) -> None:
    """Print the scores of generated answers: their means, and what they tell of errors."""
    head = ("score (the higher, the less sure)", "mean", "AUROC of errors ↑", "AURC ↓", "PRR ↑")
    rows: list[Row] = []
    for score, mean in answers.means.items():
        told = answers.errors.get(score)
        rows.append(
            (score, _cell(mean), _cell(told.auroc), _cell(told.aurc), _cell(told.prr))
            if told
            else (score, _cell(mean), "–", "–", "–")
        )
    judged = f", right or wrong by {answers.judged_by}" if answers.judged_by else ", without right and wrong"
    without = (
        f", {answers.left_out} without a score, which count in accuracy only" if answers.left_out else ""
    )
    _table(f"{name}: {answers.documents + answers.left_out} generated answers{judged}{without}", head, rows)
    if answers.accuracy and answers.confidence and answers.ece:
        print(
            f"  accuracy {_cell(answers.accuracy)}, mean p(answer) {_cell(answers.confidence)}, "
            f"ece of p(answer) {_cell(answers.ece)}"
        )


def _print_task(name: str, task: TaskResult, *, ensemble: bool) -> None:
    pooled = f", {len(task.tasks)} tasks pooled, resampled by task" if task.clustered else ""
    title = f"{name}: {task.documents} documents{pooled}"
    head = ["metric", "ensemble" if ensemble else "model"]
    head += ["mean member", "ensemble − member"] if ensemble else []
    head += ["macro over tasks"] if task.clustered else []
    rows: list[Row] = []
    for metric, m in task.metrics.items():
        if math.isnan(m.ensemble.value):
            continue
        row = [f"{metric} {_ARROWS[METRICS[metric].direction]}".strip(), _cell(m.ensemble)]
        row += [_number(m.member_mean.value), _cell(m.difference)] if ensemble else []
        row += [_cell(m.macro)] if m.macro is not None else []
        rows.append(tuple(row))
    _table(title, tuple(head), rows)
    sets: list[Row] = [
        (c.method, _cell(c.coverage), _cell(c.mean_size), str(c.n_calibration), str(c.n_test))
        for c in task.conformal
    ]
    if sets:
        asked = f"{100 * (1 - task.conformal[0].alpha):g} %"
        c = task.conformal[0]
        own = f", T = {c.temperature:.3g} from {c.n_scale} other documents" if c.n_scale else ""
        _table(
            f"{name}: conformal sets for {asked}{own}",
            ("method", "coverage", "size ↓", "calibrated", "tested"),
            sets,
        )
    if ensemble:
        _table(
            f"{name}: by ensemble size (mean over subsets)",
            ("members", "subsets", "accuracy ↑", "nll ↓", "ece ↓", "mutual_information"),
            [
                (
                    str(row.members),
                    f"{row.subsets}{'' if row.exhaustive else ' sampled'}",
                    *(_number(row.mean[m]) for m in ("accuracy", "nll", "ece", "mutual_information")),
                )
                for row in task.by_size
            ],
        )


def _print_scales(name: str, scales: Sequence[ScaleResult], *, ensemble: bool) -> None:
    """Print what the choice of scale changes: read the first column before any calibration error."""
    rows: list[Row] = []
    for scale in scales:
        if scale.undefined:
            continue
        row = [scale.label, *(_number(scale.ensemble[metric].value) for metric in METRICS_BY_SCALE)]
        if ensemble:
            row += [_number(scale.member_mean[metric].value) for metric in METRICS_BY_SCALE]
            row += [_cell(scale.difference["nll"]), _cell(scale.difference["ece"])]
        rows.append(tuple(row))
    head = ["choices' scores", "accuracy ↑", "nll ↓", "ece ↓"]
    if ensemble:
        head += ["member acc", "nll", "ece", "nll, ensemble − member", "ece, ensemble − member"]
    _table(f"{name}: by the scale of its scores", tuple(head), rows)
    for scale in scales:
        if scale.undefined:
            print(f"  {scale.label}: {scale.undefined}")


def _print_comparison(run: Run, baseline: Run, compared: dict[str, Comparison]) -> None:
    for name, c in compared.items():
        rows: list[Row] = [
            (metric, _cell(e)) for metric, e in c.difference.items() if not math.isnan(e.value)
        ]
        rows += [
            ("agreement of predictions", _cell(c.agreement)),
            ("total variation", _cell(c.total_variation)),
        ]
        _table(
            f"{name}: {run.source} minus {baseline.source}, {c.documents} documents, paired",
            ("metric", "difference"),
            rows,
        )
        if c.note:
            print(f"  {c.note}")
    for name, why in why_not_compared(run, baseline).items():
        print(f"Not compared: {name}: {why}")


def _print_replicates(runs: list[Run], evaluated: dict[str, Replicated], level: float) -> None:
    print(f"\n{len(runs)} replicates: {', '.join(run.source for run in runs)}")
    for name, found in evaluated.items():
        rows: list[Row] = [
            (
                f"{metric} {_ARROWS[METRICS[metric].direction]}".strip(),
                *_of_spread(found.ensemble[metric]),
                *_of_spread(found.member[metric])[:3],
                *_of_spread(found.difference[metric])[::2],
            )
            for metric in found.ensemble
            if not math.isnan(found.ensemble[metric].mean)
        ]
        _table(
            f"{name}: {found.replicates} replicates of {found.members} members together, {found.documents} documents, "
            f"{100 * level:g} % intervals: t over retrained ensembles, two-way over documents and ensembles",
            (
                *("metric", "ensembles, mean", "SD", "t", "two-way"),
                *("members, mean", "SD", "t"),
                *("ensemble − members", "t"),
            ),
            rows,
        )


def _of_spread(spread: Spread) -> tuple[str, str, str, str]:
    t, two_way = (
        "–" if math.isnan(low) else f"[{_number(low)}, {_number(high)}]"
        for low, high in (spread.t, spread.two_way)
    )
    return _number(spread.mean), _number(spread.standard_deviation), t, two_way


def _number(value: float) -> str:
    # Adding 0 turns a −0 left by rounding into 0.
    return "–" if math.isnan(value) else f"{round(value, 4) + 0.0:.4f}"


def _cell(estimate: Estimate) -> str:
    """Show a value with the interval to quote; a star marks one that is not BCa."""
    low, high, kind = estimate.quoted
    if math.isnan(low):
        return _number(estimate.value)
    return f"{_number(estimate.value)} [{_number(low)}, {_number(high)}]{'*' if kind == 'basic' else ''}"


def _table(title: str, head: Row, rows: list[Row]) -> None:
    """Print a plain table: columns as wide as needed, so that it can be piped and searched."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, tuple("─" * w for w in widths), *rows]:
        print("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
