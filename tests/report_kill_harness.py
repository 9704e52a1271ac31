"""Writes a report over an older one, over and over, and kills the writer with SIGKILL at random instants.

    python report_kill_harness.py FOLDER KILLS SEED

FOLDER/runs holds lm-eval's files; the report is FOLDER/report, and each writing has a title of its own, by which its
files are known to belong together. One process computes the report once and forks a writer for every kill. Until the
kill it looks at the folder without a pause. Every other kill waits until the writer says that it renders the page,
which is the last thing before the new report takes the old one's place, and falls a random moment later.

Prints one JSON object: how often the folder was looked at, how many reports were seen, what each writer died of, and
every time something was amiss.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import random
import re
import select
import signal
import sys
import time
from pathlib import Path

from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.report import illustrations  # noqa: F401 – here, so that no forked writer has to
from lm_eval_lora_ensemble.report.build import make_report, write_report
from lm_eval_lora_ensemble.report.model import Options, Report


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(seed)
    report = make_report(load_runs(folder / "runs"), Options(settings=Settings(resamples=20), figures=0))
    write_report(titled(report, "first"), folder / "report")
    start = time.monotonic()
    write_report(titled(report, "second"), folder / "report")
    seconds = time.monotonic() - start
    found: dict = {"looks": 0, "titles": [], "deaths": [], "amiss": []}
    for kill in range(kills):
        writer, told = start_writing(report, folder / "report", f"writer {kill}")
        if kill % 2:
            select.select([told], [], [])
            until = time.monotonic() + draw.uniform(0, seconds)
        else:
            until = time.monotonic() + draw.uniform(0, 12 * seconds)
        watch(folder / "report", until, found)
        os.kill(writer, signal.SIGKILL)
        found["deaths"].append(os.WTERMSIG(os.waitpid(writer, 0)[1]))
        os.close(told)
        watch(folder / "report", 0, found)
    write_report(titled(report, "last"), folder / "report")
    watch(folder / "report", 0, found)
    found["left"] = sorted(path.name for path in folder.iterdir())
    found["last"] = found["titles"][-1]
    found["titles"] = len(found["titles"])
    print(json.dumps(found))


def titled(report: Report, title: str) -> Report:
    return dataclasses.replace(report, options=dataclasses.replace(report.options, title=title))


def start_writing(report: Report, output: Path, name: str) -> tuple[int, int]:
    """Fork a process that writes for ever; return it and a descriptor where it tells of each page."""
    told, telling = os.pipe()
    writer = os.fork()
    if writer:
        os.close(telling)
        return writer, told
    try:
        number = 0
        while True:
            number += 1
            write_report(
                titled(report, f"{name}, report {number}"),
                output,
                lambda text: os.write(telling, b"p") if text == "page" else None,
            )
    finally:
        os._exit(1)


def watch(folder: Path, until: float, found: dict) -> None:
    """Look at the report, at least twice, until some instant."""
    looks = 0
    while looks < 2 or time.monotonic() < until:
        looks += 1
        look(folder, found)
    found["looks"] += looks


def look(folder: Path, found: dict) -> None:
    """Read both files of whatever folder is there; while one folder takes the other's place, look again."""
    try:
        before = identity(folder)
        try:
            titles = read_titles(folder)
        except (OSError, ValueError) as error:
            titles = repr(error)
        if identity(folder) != before:
            return
    except FileNotFoundError:
        found["amiss"].append("no report")
        return
    if isinstance(titles, str) or titles[0] != titles[1]:
        found["amiss"].append(titles)
    elif titles[0] not in found["titles"]:
        found["titles"].append(titles[0])


def identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_ino, status.st_mtime_ns


def read_titles(folder: Path) -> tuple[str, str]:
    page = (folder / "report.html").read_text(encoding="utf-8")
    if not page.rstrip().endswith("</html>"):
        raise ValueError("the page ends in the middle")
    title = html.unescape(re.search(r"<title>(.*?)</title>", page)[1])
    return title, json.loads((folder / "report.json").read_text(encoding="utf-8"))["title"]


if __name__ == "__main__":
    main()
