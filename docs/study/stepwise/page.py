"""Markdown of a study: tables between the markers of a page, values as every page shows them, what was run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from lm_eval_lora_ensemble.report.leaderboard import display
from stepwise.running import Record, Step, estimate, in_words
from stepwise.values import Value

NOT_RUN = "*Not run yet.*\n"


def filled(page: str, study: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Return the page with every block between ``<!-- study: name -->`` and ``<!-- end -->`` made anew.

    A block that gives nothing says that it was not run.
    """
    place = re.compile(rf"(<!-- {study}: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda found: found[1] + (blocks[found[2]]() or NOT_RUN) + found[3], page)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """Return a Markdown table; its first column is words, the others are right-aligned numbers."""
    aligned = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, aligned, *rows])


def shown(value: Value) -> str:
    """Show a value, its interval, and its deviation over seeds where there are several."""
    text = display(value.value)
    if not math.isnan(value.low):
        text += f" [{display(value.low)}, {display(value.high)}]"
    return text if math.isnan(value.deviation) else f"{text} ± {display(value.deviation)}"


def time_and_machine(every: Sequence[Step], records: Mapping[str, Record]) -> list[str]:
    """Return the machine, and what the steps took and will take, as points of a list."""
    at_a_time = [record.machine.get("steps at a time", 1) for record in records.values()]
    took = sum(record.seconds / jobs for record, jobs in zip(records.values(), at_a_time, strict=True))
    worked = sum(record.cost for record in records.values())
    left = estimate(every, records)
    machines = dict.fromkeys(
        ", ".join(f"{key} {value}" for key, value in record.machine.items()) for record in records.values()
    )
    at_least = "at least " if any(record.interrupted for record in records.values()) else ""
    return [
        *(f"* Machine: {machine}." for machine in machines),
        f"* Steps: {len(records)} of {len(every)}, {at_least}{in_words(took)} by the clock, "
        + f"{in_words(worked)} of one core. "
        + (f"Left: about {in_words(sum(left.values()) / max(at_a_time))}." if left else "Nothing is left."),
    ]
