"""Print the tables of docs/study.md from a report.json: python docs/study/tables.py REPORT_FOLDER."""

import json
import sys
from pathlib import Path


def cell(estimate: dict) -> str:
    """Show a value with the interval that reports quote."""
    kind = "bca" if estimate["bca"][0] is not None else "basic"
    value, (low, high) = estimate["value"], estimate[kind]
    if value is None or low is None:
        return "–"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("|" + "|".join(line) + "|" for line in lines)


def main(folder: Path) -> None:
    """Print epochs, retention, detection and distances."""
    report = json.loads((folder / "report.json").read_text())
    series = report["series"]
    measures = ["accuracy", "nll", "ece", "predictive_entropy", "mutual_information"]
    for task in dict.fromkeys(s["task"] for s in series):
        having = [s for s in series if s["task"] == task]
        print(f"\n### {task}, {having[0]['documents']} documents\n")
        rows = [
            [f"{s['label']}, epoch {p['epoch']}, M = {m}", *(cell(p[kind][name]) for name in measures)]
            for s in having
            for p in s["points"]
            for kind, m in (("single", 1), ("ensemble", p["members"]))
            if kind == "ensemble" or p["members"] > 1
        ]
        print(table(["", *measures], rows))
    kept = ["kept", "gained", "agreement", "total_variation", "kl_to_prior"]
    print("\n### Retention of the ensemble\n")
    rows = [
        [f"{s['task']}, {s['label']}, epoch {p['epoch']}", *(cell(p["retention"][name]) for name in kept)]
        for s in series
        for p in s["points"]
        if p["epoch"] and p["retention"]
    ]
    print(table(["", *kept], rows))
    print("\n### Detection, AUROC\n")
    scores = ["max_probability", "entropy", "expected_entropy", "mutual_information"]
    rows = [
        [f"{report['runs'][int(run)]['label']}, {outside}", *(cell(by_score[s]["auroc"]) for s in scores)]
        for run, by_inside in report["detection"].items()
        for by_outside in by_inside.values()
        for outside, by_score in by_outside.items()
    ]
    print(table(["", *scores], rows))
    print("\n### Between the two ensembles\n")
    rows = [
        [f"{b['task']}, epoch {epoch}", cell(b["agreement"][i]), cell(b["total_variation"][i])]
        for b in report["between"]
        for i, epoch in enumerate(b["epochs"])
    ]
    print(table(["", "agreement", "total variation"], rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
