"""The text of the cards: what the ensemble is, how to use it, its results, what they are about, and their limits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from lm_eval_lora_ensemble.analysis.distribution import CROSSFIT, RAW, VALIDATION, Distribution
from lm_eval_lora_ensemble.card.results import RunResults
from lm_eval_lora_ensemble.card.subject import Subject
from lm_eval_lora_ensemble.ensemble.manifest import MemberEntry
from lm_eval_lora_ensemble.errors import one_line
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate
from lm_eval_lora_ensemble.metrics.registry import METRICS
from lm_eval_lora_ensemble.metrics.strings import STRING_METRICS
from lm_eval_lora_ensemble.report.answers import task_name
from lm_eval_lora_ensemble.report.leaderboard import COLUMNS, Board, Cell, display
from lm_eval_lora_ensemble.report.markdown import escape

PROJECT = "https://github.com/lm-eval-lora-ensemble/lm-eval-lora-ensemble"

_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
_RECIPE_KEYS = (
    *(
        "task",
        "objective",
        "rank",
        "alpha",
        "dropout",
        "target_modules",
        "optimizer",
        "learning_rate",
        "posterior",
    ),
    *("lora_l2", "epochs", "max_steps", "batch_size"),
)
_EMPTY: tuple[Any, ...] = (None, "", "none", [])


def ensemble_text(subject: Subject) -> str:
    """Return the text of an ensemble's card, without the metadata above it."""
    parts = [
        [f"# {escape(subject.name)}", "", _what_it_is(subject)],
        _use(subject),
        _results(subject),
        _meaning(subject),
        _members(subject),
        _made_by(subject),
        _limits(subject),
    ]
    return "\n".join(line for part in parts for line in (*part, "")).rstrip("\n") + "\n"


def member_text(subject: Subject, index: int) -> str:
    """Return the text of a member's card: what it is alone, and where the ensemble's card is.

    Args:
        subject: the ensemble.
        index: of the member, from 0.
    """
    entry = subject.members[index]
    above = "../" * len(entry.folder.strip("/").split("/"))
    base = _base(subject)
    load = subject.base_model or subject.base_label
    lines = [
        f"# {escape(entry.name)} of {escape(subject.name)}",
        "",
        f"A LoRA adapter on {base}: member {index + 1} of {len(subject.members)} of an ensemble{_origin(entry)}. "
        f"**The [ensemble's card]({above}README.md) says what the members give together, how they were made, and the "
        "limits.** Its numbers are the ensemble's, not this member's.",
        "",
        "Alone it is an ordinary PEFT adapter:",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(load)})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(_place(subject))}, subfolder={json.dumps(entry.folder)})"
        if subject.repository
        else f"model = PeftModel.from_pretrained(base, {json.dumps(f'FOLDER/{entry.folder}')})",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _what_it_is(subject: Subject) -> str:
    n = len(subject.members)
    together = (
        "They answer as one model, whose probabilities are the mean of the members' (the Bayesian model average); "
        "where the members disagree, the model is less sure."
        if n > 1
        else "It answers as an ensemble of one member."
    )
    method = subject.manifest.method
    made = (
        f"drawn by {escape(method.described())}"
        if method
        else "trained from different seeds"
        if n > 1 and all(entry.seed is not None for entry in subject.members)
        else ""
    )
    return (
        f"{n} LoRA adapter{'s' if n > 1 else ''} on {_base(subject)}{', ' if made else ''}{made}. {together}"
    )


def _base(subject: Subject) -> str:
    if subject.base_model:
        return f"[{subject.base_model}](https://huggingface.co/{subject.base_model})"
    return escape(subject.base_label)


def _use(subject: Subject) -> list[str]:
    first = next(iter([board.task for result in subject.results for board in result.boards]), None)
    others = [name for result in subject.results for name in (*result.strings, *result.run.answers)]
    task = one_line(first or next(iter(others)))
    placeholders = {
        "FOLDER": "where the files of this repository are",
        "BASE": f"the base model, {subject.base_label}",
    }
    arguments = f"{subject.base_arguments}adapters={_place(subject)}"
    explained = [f" `{name}` is {what}." for name, what in placeholders.items() if f"={name}" in arguments]
    return [
        "## Use",
        "",
        "```sh",
        f"pip install git+{PROJECT}",
        f"lm_eval run --model lora-ensemble --model_args {arguments} --tasks {task} "
        "--log_samples --output_path results",
        "```",
        "",
        f"`lora-ensemble report results` makes a page of it.{''.join(explained)} Each member alone is an "
        "ordinary PEFT adapter.",
    ]


def _place(subject: Subject) -> str:
    return subject.repository or "FOLDER"


# ------------------------------------------------------------------------------------------------ results


def _results(subject: Subject) -> list[str]:
    lines = ["## Results", ""]
    for result in subject.results:
        for board in result.boards:
            lines += [*_of_board(result, board), ""]
        for task, strings in result.strings.items():
            lines += [
                f"**{escape(result.title(task))}**, {strings.documents} whole strings{_limited(result)}",
                "",
            ]
            lines += ["| | ensemble |", "|---|---:|"]
            lines += [
                f"| {name}{_ARROWS[STRING_METRICS[name].direction]} | {_shown(value)} |"
                for name, value in strings.metrics.items()
            ]
            lines.append("")
        lines += _of_answers(result)
    lines += [*_intervals(subject)]
    return lines


def _of_board(result: RunResults, board: Board) -> Iterator[str]:
    rows = {row.kind: row for row in board.rows}
    whole = rows.get("ensemble") or rows["model"]
    pooled = f", {len(board.tasks)} tasks pooled" if len(board.tasks) > 1 else ""
    n = whole.cells["nll"].n
    yield f"**{escape(result.title(board.task))}**, {n} documents{pooled}{_limited(result)}"
    yield ""
    mean, gains = rows.get("mean member"), board.gains.get(0)
    paired = mean is not None and gains is not None
    yield "| | ensemble | mean member | ensemble − mean member |" if paired else "| | ensemble |"
    yield "|---|---:|---:|---:|" if paired else "|---|---:|"
    for metric, head in COLUMNS.items():
        cells = [whole.cells[metric]]
        if mean is not None and gains is not None:
            cells += [mean.cells[metric], gains[metric]]
        yield f"| {head}{_ARROWS[METRICS[metric].direction]} | {' | '.join(map(_cell, cells))} |"


def _of_answers(result: RunResults) -> list[str]:
    lines: list[str] = []
    for task, by_filter in (result.answers.results if result.answers else {}).items():
        for filter_key, answers in by_filter.items():
            name = escape(task_name(result.title(task), filter_key))
            without = f", {answers.left_out} of them without a score" if answers.left_out else ""
            asked = answers.documents + answers.left_out
            lines += [f"**{name}**, {asked} generated answers{without}{_limited(result)}", ""]
            lines += ["| | ensemble |", "|---|---:|"]
            if answers.accuracy is not None:
                lines.append(f"| {answers.judged_by} ↑ | {_shown(answers.accuracy)} |")
            if answers.ece is not None:
                lines.append(f"| ece of p(answer) ↓ | {_shown(answers.ece)} |")
            lines += [
                f"| AUROC of {score}, errors against right answers ↑ | {_shown(of.auroc)} |"
                for score, of in answers.errors.items()
            ]
            lines.append("")
    return lines


def _limited(result: RunResults) -> str:
    limit = result.run.config.get("limit")
    return "" if limit in (None, "") else f" (`--limit {limit:g}`)" if isinstance(limit, (int, float)) else ""


def _intervals(subject: Subject) -> list[str]:
    said = (
        f"In brackets: {subject.level:.0%} bootstrap intervals over documents, the members held fixed. They say how "
        "far a number would move with other questions of the same kind, not with members of other seeds."
    )
    if len(subject.members) > 1:
        said += (
            " The mean member is the mean of the members' own values, what one of them gives on average. The "
            "difference is paired, on the same documents; where its interval holds 0, averaging changed "
            "nothing that can be seen."
        )
    if any(len(board.tasks) > 1 for result in subject.results for board in result.boards):
        said += " Of tasks that are pooled, whole tasks are drawn."
    return [
        f"{said} ↑ higher is better, ↓ lower; nll, entropy and MI (mutual information) are in nats. "
        f"[What each metric is]({PROJECT}/blob/main/docs/metrics.md)."
    ]


def _cell(cell: Cell) -> str:
    value = cell.display
    return value if math.isnan(cell.low) else f"{value} [{display(cell.low)}, {display(cell.high)}]"


def _shown(estimate: Estimate) -> str:
    low, high, _ = estimate.quoted
    value = display(estimate.value)
    return value if math.isnan(low) else f"{value} [{display(low)}, {display(high)}]"


def _meaning(subject: Subject) -> list[str]:
    """Say which distribution the numbers are about, and how it was computed."""
    lines = ["## What the numbers are about", ""]
    distributions = {
        result.run.distribution.label: result.run.distribution for result in subject.results if result.boards
    }
    lines += [f"- Choices: {label}. {_in_words(of)}" for label, of in distributions.items()]
    if any(result.strings for result in subject.results):
        lines.append(
            "- Whole strings: nll is −log of the members' mean probability of the whole string, in nats."
        )
    if any(result.answers for result in subject.results):
        lines.append(
            "- Generated answers: decoded from the mixture of the members; p(answer) is what the mixture gives the "
            "text that it generated."
        )
    versions = dict.fromkeys(map(_scored_how, subject.results))
    return [*lines, *(f"- Scored {how}." for how in versions)]


def _in_words(distribution: Distribution) -> str:
    unit = {
        "sum": "A choice's score is the sum of its tokens' log-probabilities, so that written-out answers of different "
        "length are not on one scale",
        "chars": "A choice's score is its loglikelihood divided by its characters",
        "bytes": "A choice's score is its loglikelihood divided by its bytes",
        "tokens": "A choice's score is its loglikelihood divided by its tokens",
    }[distribution.scores]
    scale = {
        RAW: "the softmax over the choices is taken as it is, at temperature 1",
        VALIDATION: "the temperature of the softmax was fitted on the validation split that ensemble.json names, "
        "before these documents were seen",
        CROSSFIT: "the temperature of the softmax was fitted on other folds of these very documents, an oracle that a "
        "user does not have",
    }.get(
        distribution.temperature,
        f"the temperature of the softmax was fitted on the documents of {escape(distribution.temperature)}",
    )
    return f"{unit}; {scale}."


def _scored_how(result: RunResults) -> str:
    scored = result.scored
    versions = scored.get("versions")
    packages = versions if isinstance(versions, Mapping) else {}
    parts = [
        f"in {escape(str(scored['dtype']))}" if scored.get("dtype") else "",
        f"on {escape(str(scored['device']))}" if scored.get("device") else "",
        f"with lm-eval {escape(str(packages['lm-eval']))}" if packages.get("lm-eval") else "",
        f"and torch {escape(str(packages['torch']))}" if packages.get("torch") else "",
        f"on {result.run.date[:10]}" if result.run.date else "",
    ]
    return " ".join(part for part in parts if part)


# -------------------------------------------------------------------------------------- members and making


def _members(subject: Subject) -> list[str]:
    lines = ["## Members", "", "| member | from |", "|---|---|"]
    lines += [
        f"| [{escape(entry.name)}]({quote(entry.folder)}) | {_origin(entry).removeprefix(', ') or '–'} |"
        for entry in subject.members
    ]
    return [
        *lines,
        "",
        "`ensemble.json` has the sha256 of every adapter file; `lora-ensemble check` compares them.",
    ]


def _origin(entry: MemberEntry) -> str:
    if entry.provenance:
        number = "" if entry.draw is None else f"draw {entry.draw} "
        return f", {number}of {escape(entry.provenance.name)} (sha256 {entry.provenance.sha256[:12]})"
    return "" if entry.seed is None else f", seed {entry.seed}"


def _made_by(subject: Subject) -> list[str]:
    method, recipe = subject.manifest.method, subject.manifest.recipe
    if not method and not recipe:
        return ["## How the members were made", "", "Not known here: they were put together from elsewhere."]
    lines = ["## How the members were made", ""]
    if method:
        settings = {**method.options, **method.settings}
        lines += [f"Drawn by `{method.name}`{'' if method.seed is None else f', seed {method.seed}'}.", ""]
        lines += _table(settings)
        lines += ["", "What they were drawn from was trained by:", ""] if recipe else []
    if recipe:
        lines += _table({key: recipe[key] for key in _RECIPE_KEYS if recipe.get(key) not in _EMPTY})
        lines += ["", "`ensemble.json` holds every setting (`recipe`)."]
    return lines


def _table(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that are numbers, words or lists of them; what names a place on a machine is left out."""
    rows = [(key, said) for key, value in settings.items() if (said := _value(value)) is not None]
    return [
        "| setting | value |",
        "|---|---|",
        *(f"| {escape(key)} | {escape(said)} |" for key, said in rows),
    ]


def _value(value: Any) -> str | None:
    if isinstance(value, (list, tuple)):
        parts = [_value(item) for item in value]
        return None if None in parts else ", ".join(map(str, parts))
    if value is None or isinstance(value, Mapping):
        return None
    text = one_line(f"{value:g}" if isinstance(value, float) else str(value))
    return None if text.startswith(("/", "~", ".")) or "\\" in text else text


def _limits(subject: Subject) -> list[str]:
    tasks = ", ".join(escape(result.title(name)) for result in subject.results for name in _tasks(result))
    lines = [
        "## Limits",
        "",
        f"- The numbers are of {tasks}, with lm-eval's prompts. They say nothing of other tasks, prompts or languages.",
        "- Probabilities that are calibrated on one task need not be so on another, and a low disagreement between "
        "members is no proof of a right answer.",
    ]
    if any(result.boards and result.run.distribution.temperature == RAW for result in subject.results):
        lines.append("- No temperature was fitted: calibration is that of the scores as they are.")
    if any(result.run.config.get("limit") not in (None, "") for result in subject.results):
        lines.append("- Only the first documents of a task were scored, as said beside its name.")
    lines.append(f"- The licence and the limits of the base model, {_base(subject)}, apply.")
    return lines


def _tasks(result: RunResults) -> Sequence[str]:
    return [*(board.task for board in result.boards), *result.strings, *result.run.answers]
