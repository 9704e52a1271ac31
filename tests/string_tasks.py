"""Small lm-eval tasks of whole strings over local rows: in LAMBADA's form, in wikitext's, and a group of two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from harness_tasks import WORDS

OWN_COUNTS = """
def count_raw_page(doc, results):
    (score,) = results
    words, size = len(doc["page"].split()), len(doc["page"].encode("utf-8"))
    return {"word_perplexity": (score, words), "byte_perplexity": (score, size), "bits_per_byte": (score, size)}
"""
PERPLEXITIES = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]


def write_string_tasks(folder: Path, n_rows: int = 14) -> Path:
    """Write ``last_word``, ``pages``, ``own_counts``, ``bytes_only`` and the group ``written`` of the latter two.

    Pages are shorter and longer than the tiny model's window of 256 tokens. ``own_counts`` counts its words before
    its text is rewritten, as wikitext does. ``last_word`` has ``n_rows`` documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(17)

    def phrase(n: int) -> str:
        return " ".join(draw.choice(WORDS, size=n))

    _task(
        folder,
        "last_word",
        [{"text": phrase(int(draw.integers(4, 15)))} for _ in range(n_rows)],
        output_type="loglikelihood",
        doc_to_text="{{text.split(' ')[:-1]|join(' ')}}",
        doc_to_target="{{' '+text.split(' ')[-1]}}",
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    )
    sizes = {"pages": (3, 40, 400, 170, 9, 1), "own_counts": (5, 80, 30), "bytes_only": (12, 7)}
    for name, lengths in sizes.items():
        _task(
            folder,
            name,
            [{"page": f"{phrase(n)} – , {phrase(2)}"} for n in lengths],
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{page|replace(' , ', ', ')}}",
            metric_list=PERPLEXITIES[1:2] if name == "bytes_only" else PERPLEXITIES,
        )
    (folder / "own_count.py").write_text(OWN_COUNTS)
    with (folder / "own_counts.yaml").open("a") as stream:
        stream.write("process_results: !function own_count.count_raw_page\n")
    listed = [{"metric": "byte_perplexity", "weight_by_size": True}]
    group = {"group": "written", "task": ["own_counts", "bytes_only"], "aggregate_metric_list": listed}
    (folder / "written.yaml").write_text(yaml.safe_dump(group))
    return folder


def _task(folder: Path, name: str, rows: list[dict], **config: object) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({"task": name, "test_split": "test", **files, **config})
    )
