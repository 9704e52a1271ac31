"""Write the YAML files of this folder from the installed lm-eval: ``python tasks/mmlu_uq/generate.py``.

Each of the 57 subjects refers to its stock task and takes over nothing but its name, so that prompts follow
lm-eval; the groups mirror the stock ones.
"""

from __future__ import annotations

from pathlib import Path

import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml

STOCK_TASKS = Path(lm_eval.tasks.__file__).parent
STOCK = STOCK_TASKS / "mmlu" / "default"
HEADER = "# Written by generate.py from lm-eval's mmlu: change that file and run it again.\n"
# ece, rms_ce and members have no entry: a mean over subjects would be wrong, the plugin pools the documents.
GROUP_METRICS = (
    "acc",
    "nll",
    "brier_score",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
)


def files() -> dict[str, str]:
    """Return the content of every YAML file of this folder, by file name."""
    subjects = [_subject(path) for path in sorted(STOCK.glob("mmlu_*.yaml"))]
    groups = [_group(path) for path in sorted(STOCK.glob("_mmlu*.yaml"))]
    return dict(subjects + groups)


def _subject(path: Path) -> tuple[str, str]:
    stock = load_yaml(path, resolve_func=False)
    name = _ours(stock["task"])
    text = HEADER + (
        f"task: {name}\n"
        f"tag: {_ours(stock['tag'])}\n"
        "class: !function lm_eval_lora_ensemble.harness.UncertaintyTask\n"
        f"stock: {path.relative_to(STOCK_TASKS).as_posix()}\n"
        "output_type: multiple_choice\n"
    )
    return f"{name}.yaml", text


def _group(path: Path) -> tuple[str, str]:
    stock = load_yaml(path, resolve_func=False)
    name = _ours(stock["group"])
    alias = f"group_alias: {stock['group_alias']}\n" if "group_alias" in stock else ""
    text = HEADER + f"group: {name}\n{alias}task:\n"
    text += "".join(f"  - {_ours(task)}\n" for task in stock["task"])
    text += "aggregate_metric_list:\n"
    text += "".join(f"  - metric: {metric}\n    weight_by_size: true\n" for metric in GROUP_METRICS)
    text += f"metadata:\n  version: {stock['metadata']['version']}\n"
    return f"_{name}.yaml", text


def _ours(stock_name: str) -> str:
    """Return our name of a stock task, tag or group: ``mmlu_anatomy`` becomes ``mmlu_uq_anatomy``."""
    return stock_name.replace("mmlu", "mmlu_uq", 1)


def main() -> None:
    """Replace the folder's YAML files."""
    folder = Path(__file__).parent
    for old in folder.glob("*.yaml"):
        old.unlink()
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
