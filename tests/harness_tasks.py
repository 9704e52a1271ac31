"""Small lm-eval tasks over local rows: a plain one, one that varies the context, one with several golds, a group."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

WORDS = [
    "member",
    "adapter",
    "layer",
    "prompt",
    "answer",
    "choice",
    "model",
    "ensemble",
    "number",
    "folder",
    "token",
    "score",
]


def write_tasks(folder: Path, n_rows: int = 21) -> Path:
    """Write tasks ``plain_a``, ``plain_b`` (group ``both``), ``varies_context`` and ``several_golds``.

    ``plain_a`` has ``n_rows`` documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(11)
    for name, n in (("plain_a", n_rows), ("plain_b", 9)):
        rows = [_row(draw, n_choices=int(draw.integers(2, 5))) for _ in range(n)]
        _task(
            folder,
            name,
            rows,
            doc_to_text="{{question}}",
            doc_to_choice="choices",
            doc_to_target="gold",
            metric_list=[
                {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
            ],
        )
    golds = [{**_row(draw, 4), "golds": [0, 2]} for _ in range(4)]
    _task(
        folder,
        "several_golds",
        golds,
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="golds",
    )
    varied = [{**_row(draw, 2), "ending": "is a word"} for _ in range(12)]
    # as winogrande: doc_to_text gives the index, doc_to_choice the contexts, doc_to_target the continuation
    _task(
        folder,
        "varies_context",
        varied,
        doc_to_text="{{gold}}",
        doc_to_choice="choices",
        doc_to_target="ending",
    )
    group = {
        "group": "both",
        "task": ["plain_a", "plain_b"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


OWN_SCORING = """
import numpy as np

def share_of_true(doc, results):
    p = np.exp([score for score, _ in results])
    return {"acc": float(p[np.array(doc["labels"]) == 1].sum() / p.sum())}
"""


def write_own_scoring(folder: Path) -> Path:
    """Write ``own_scoring``, in the form of TruthfulQA's mc2: several true choices, scored by the task's own rule.

    Its ``doc_to_target`` is 0 whatever is right, as there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(13)
    rows = [_row(draw, n_choices=4) for _ in range(10)]
    rows = [{**row, "labels": draw.permutation([1, 1, 0, 0][: len(row["choices"])]).tolist()} for row in rows]
    (folder / "own_rule.py").write_text(OWN_SCORING)
    _task(folder, "own_scoring", rows, doc_to_text="{{question}}", doc_to_choice="choices", doc_to_target=0)
    with (folder / "own_scoring.yaml").open("a") as stream:
        stream.write("process_results: !function own_rule.share_of_true\n")
    return folder


def _row(draw: np.random.Generator, n_choices: int) -> dict:
    def phrase(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS, size=int(draw.integers(low, high))))

    choices = list(dict.fromkeys(phrase(1, 4) for _ in range(n_choices * 3)))[:n_choices]
    return {
        "question": f"Which {phrase(3, 9)}?",
        "choices": choices,
        "gold": int(draw.integers(len(choices))),
    }


def _task(folder: Path, name: str, rows: list[dict], **config: object) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **config,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
