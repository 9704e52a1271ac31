"""From lm-eval's files to a folder with the report: nothing but those files is read, and it appears in one step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.analysis.domains import detect_all
from lm_eval_lora_ensemble.analysis.replicates import replicate_sets, sharing_members
from lm_eval_lora_ensemble.analysis.run import Run
from lm_eval_lora_ensemble.analysis.scales import ScaleResult, by_scale
from lm_eval_lora_ensemble.disk import write_folder
from lm_eval_lora_ensemble.errors import EnsembleError, one_line
from lm_eval_lora_ensemble.report import headline, markdown, page
from lm_eval_lora_ensemble.report.answers import answer_rows, make_answers
from lm_eval_lora_ensemble.report.answers import sentences as answers_in_words
from lm_eval_lora_ensemble.report.documents import pick_documents
from lm_eval_lora_ensemble.report.entries import Entry, is_last_epoch, make_entries
from lm_eval_lora_ensemble.report.leaderboard import Board, leaderboard
from lm_eval_lora_ensemble.report.model import Detections, Options, Report
from lm_eval_lora_ensemble.report.series import compare_series, make_series

MARK = "report.json"
"""The file by which a folder is known to be a report, and may be replaced by a newer one."""


def make_report(
    runs: Sequence[Run], options: Options, tell: Callable[[str], None] = lambda _: None
) -> Report:
    """Compute everything the report shows.

    Args:
        runs: from :func:`~lm_eval_lora_ensemble.analysis.runs.load_runs`.
        options: what to show.
        tell: is told what is being worked on.

    Raises:
        EnsembleError: no run has a task with gold answers, or no run has an out-of-domain task.
    """
    entries = make_entries(runs)
    for name in options.ood:
        if not any(e.run.has_scores(name) or name in e.run.answers for e in entries):
            known = sorted({n for e in entries for n in (*e.run.names(), *e.run.answers)})
            raise EnsembleError(f"no run has the out-of-domain task {name!r}; tasks are {', '.join(known)}")
    boards: list[Board] = []
    sets = replicate_sets([entry.run for entry in entries], options.replicates)
    for board in leaderboard(entries, options.settings, sets):
        tell(f"leaderboard: {board.task}")
        boards.append(board)
    if not boards and not any(entry.run.answers for entry in entries):
        reasons = {
            f"{n}: {why}" for e in entries for n, why in {**e.run.skipped, **_unknown_golds(e.run)}.items()
        }
        raise EnsembleError(f"no task of any run has gold answers: {'; '.join(sorted(reasons))}")
    boards.sort(key=lambda board: -len(board.tasks))  # groups first; within equals the runs' own order
    tell("epochs and out-of-domain detection")
    series = make_series(entries, options.settings)
    detections = _detections(entries, options)
    tell("generated answers")
    answers = make_answers(entries, options.ood, options.settings)
    tell("documents")
    return Report(
        options=options,
        entries=entries,
        boards=boards,
        detections=detections,
        series=series,
        between=compare_series(entries, options.settings),
        documents=pick_documents(entries, options.documents),
        statements=[
            *headline.sentences(entries, boards, detections),
            *answers_in_words(answers, entries),
        ],
        notes=[
            *dict.fromkeys(note for board in boards for note in board.notes),
            *(note for one in series for note in one.notes),
            *_left_out(entries),
            *map(one_line, sharing_members([entry.run for entry in entries])),
        ],
        scales=_scales(entries, options),
        answers=answers,
    )


def _scales(entries: Sequence[Entry], options: Options) -> dict[int, dict[str, list[ScaleResult]]]:
    """Judge the top-level tasks of every run under each scale; of a sweep, in the last epoch."""
    return {
        index: found
        for index, entry in enumerate(entries)
        if is_last_epoch(entry, entries)
        and (
            found := {
                name: scales
                for name in entry.run.top_level()
                if (scales := by_scale(entry.run, name, options.settings))
            }
        )
    }


def _unknown_golds(run: Run) -> dict[str, str]:
    return {name: p.missing_gold for name, p in run.tasks.items() if p.is_gold is None}


def _left_out(entries: Sequence[Entry]) -> list[str]:
    return [
        one_line(f"{entry.label}: {name} is left out: {why}")
        for entry in entries
        for name, why in {**entry.run.skipped, **_unknown_golds(entry.run)}.items()
    ]


def _detections(entries: Sequence[Entry], options: Options) -> Detections:
    """Compare out-of-domain with in-domain documents in every run that has both; of a sweep, in the last epoch."""
    detections: Detections = {}
    for index, entry in enumerate(entries):
        out = [name for name in options.ood if entry.run.has_scores(name)]
        besides = [leaf for name in out for leaf in entry.run.scored_leaves(name) if leaf in entry.run.tasks]
        if out and is_last_epoch(entry, entries) and entry.run.top_level(besides=besides):
            detections[index] = detect_all(entry.run, out, options.settings)
    return detections


def refuse_foreign(output: Path) -> None:
    """Check that ``output`` may be written: it is new, empty, or an earlier report.

    Raises:
        EnsembleError: it is something else.
    """
    if output.exists() and not (output / MARK).is_file() and (output.is_file() or any(output.iterdir())):
        raise EnsembleError(f"{output} exists and is not a report; name a new folder with --output")


def write_report(report: Report, output: Path, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Write all files beside ``output`` and put them there in one step; return the page's path.

    Raises:
        EnsembleError: ``output`` exists and is not an earlier report, or cannot be written.
    """
    refuse_foreign(output)
    try:
        # a link stays a link: what it points to is replaced
        write_folder(output.resolve(), None, lambda folder: _write(report, folder, tell))
    except OSError as error:
        raise EnsembleError(f"{output} cannot be written ({error}); name another --output") from error
    return output / page.FILE_NAME


def _write(report: Report, folder: Path, tell: Callable[[str], None]) -> None:
    # matplotlib takes a second to import
    from lm_eval_lora_ensemble.report import illustrations

    options = report.options
    candidates = illustrations.choose(
        report.entries, report.series, report.between, report.detections, options.settings
    ) + illustrations.of_answers(report.entries, report.answers)
    pictures = candidates[: options.figures]
    notes = list(report.notes)
    if len(pictures) < len(candidates):
        n = len(candidates)
        notes.append(f"{len(pictures)} of {n} figures are drawn; --figures {n} draws all")
    (folder / "figures").mkdir()
    for picture in pictures:
        tell(f"figure: {picture.title}")
        picture.write(folder / "figures")
    data: Mapping[str, Any] = {**report.to_dict(), "notes": notes}
    (folder / MARK).write_text(
        json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
    )
    (folder / "leaderboard.csv").write_text(markdown.to_csv(report.boards), encoding="utf-8")
    rows = answer_rows(report.answers, report.entries)
    (folder / "report.md").write_text(
        markdown.to_markdown(options.title, report.boards, report.statements, rows), encoding="utf-8"
    )
    tell("page")
    (folder / page.FILE_NAME).write_text(
        page.render(report, pictures, folder / "figures", notes), encoding="utf-8"
    )
