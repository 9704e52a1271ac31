"""Strip lm-eval's files of every text, so that real results can be kept beside the tests.

    python tests/data/numbers_only.py RESULTS_FOLDER tests/data/NAME

What stays is scores, gold indices, hashes and metrics: facts about a run, no sentence of a data set.
"""

import json
import sys
from pathlib import Path

SAMPLE_TEXTS = {"doc", "arguments", "resps"}
NEEDLESS = {"metrics", "prompt_hash", "target_hash"}
RESULTS_KEYS = {"results", "group_subtasks", "n-shot", "higher_is_better", "n-samples"}
ENSEMBLE_KEYS = {"fingerprint", "epoch", "average"}


def strip(source: Path, target: Path) -> None:
    """Write every results and samples file below ``source`` to the new folder ``target``."""
    target.mkdir(parents=True)
    for results in sorted(source.rglob("results_*.json")):
        whole = json.loads(results.read_text())
        ensemble = whole["config"].get("lora_ensemble", {})
        kept = {key: value for key, value in whole.items() if key in RESULTS_KEYS}
        kept["config"] = {
            "model": whole["config"]["model"],
            "lora_ensemble": {key: value for key, value in ensemble.items() if key in ENSEMBLE_KEYS},
        }
        (target / results.name).write_text(json.dumps(kept, indent=1))
        for samples in results.parent.glob(f"samples_*{results.stem.removeprefix('results')}.jsonl"):
            lines = (json.loads(line) for line in samples.open())
            numbers = ({k: v for k, v in line.items() if k not in SAMPLE_TEXTS | NEEDLESS} for line in lines)
            (target / samples.name).write_text("".join(json.dumps(line) + "\n" for line in numbers))


if __name__ == "__main__":
    strip(Path(sys.argv[1]), Path(sys.argv[2]))
