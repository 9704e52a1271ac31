"""Does what docs/extend.md says, to the letter: writes its files, runs its commands, finds what it promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from documented_place import in_shell
from safetensors.torch import load_file

PAGE = (PROJECT / "docs" / "extend.md").read_text(encoding="utf-8")
FILES = re.findall(r"`([\w.]+)`[^\n`]*:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ensemble) -> Path:
    """The page's folder after all of its commands; ``pip install`` goes beside it, not into this environment."""
    place = tmp_path_factory.mktemp("extend")
    shutil.copytree(ensemble / "member_00", place / "my_adapter")
    for name, text in FILES:
        (place / name).write_text(text, encoding="utf-8")
    for number, command in enumerate(COMMANDS):
        (place / f"{number}.out").write_text(run(command, place))
    return place


def run(command: str, place: Path) -> str:
    return in_shell(
        command,
        place,
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        PYTHONPATH=str(place / "installed"),
        PIP_TARGET=str(place / "installed"),
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",  # pip reads it as the flag's value: no isolation
        COLUMNS="200",
    )


def test_the_page_has_the_files_and_commands_that_this_test_runs():
    assert [name for name, _ in FILES] == [
        "sure_metrics.py", "pyproject.toml", "trees.yaml", "trees.jsonl", "plot_entropies.py", "jitter.py"
    ]  # fmt: skip
    assert [command.split()[0] for command in COMMANDS] == [
        "pip", "lm_eval", "lora-ensemble", "python", "lora-ensemble", "lm_eval"
    ]  # fmt: skip


def test_the_new_metrics_are_in_lm_evals_table_when_asked_for(folder):
    (file,) = (folder / "results").rglob("results_*.json")
    row = json.loads(file.read_text())["results"]["trees"]
    samples = [json.loads(line) for line in next((folder / "results").rglob("samples_trees_*")).open()]
    confidence, right = np.array([sample["ece"] for sample in samples]).T
    assert row["share_sure,none"] == pytest.approx((confidence >= 0.4).mean())
    assert row["share_sure_stderr,none"] != "N/A"
    assert [sample["share_sure"] for sample in samples] == (confidence >= 0.4).tolist()
    # few documents, far apart: each in a bin of its own unless two share one
    bins = np.ceil(confidence * 15)
    gaps = [(confidence - right)[bins == b].sum() for b in set(bins)]
    assert row["over_confidence,none"] == pytest.approx(np.maximum(gaps, 0).sum() / len(samples))
    assert "|over_confidence" in (folder / "1.out").read_text().replace(" ", "")


def test_the_new_metrics_are_in_the_analysis(folder):
    found = json.loads((folder / "analysis.json").read_text())["runs"][0]
    (file,) = (folder / "results").rglob("results_*.json")
    row = json.loads(file.read_text())["results"]["trees"]
    for name in ("share_sure", "over_confidence"):
        value = found["tasks"]["trees"]["metrics"][name]["ensemble"]["value"]
        assert value == pytest.approx(row[f"{name},none"])
        assert name in (folder / "2.out").read_text()
    assert found["metrics"]["over_confidence"]["direction"] == "lower"


def test_the_new_metric_has_its_column_in_the_leaderboard(folder):
    code = "from lm_eval_lora_ensemble.report.leaderboard import COLUMNS; print(COLUMNS['over_confidence'])"
    assert run(f'python -c "{code}"', folder).strip() == "over-conf."


def test_the_new_figure_is_drawn(folder):
    assert (folder / "entropies.svg").read_bytes().startswith(b"<?xml")
    assert (folder / "entropies.png").read_bytes().startswith(b"\x89PNG")


def test_the_new_posterior_draws_what_it_declares(folder):
    own = load_file(folder / "my_adapter" / "adapter_model.safetensors")
    drawn = [
        load_file(path / "adapter_model.safetensors") for path in sorted((folder / "drawn").glob("member_*"))
    ]
    assert len(drawn) == 5
    noise = np.stack([np.concatenate([(one[n] - own[n]).flatten() for n in own]) for one in drawn])
    # 5 × 2,016 normal numbers: the standard error of a mean is 1 %, of a deviation 0.7 % of it
    assert abs(noise.mean()) < 0.05 * 0.02
    assert noise.std() == pytest.approx(0.02, rel=0.04)


def test_the_new_posterior_is_named_in_results(folder):
    (file,) = (folder / "jittered").rglob("results_*.json")
    said = json.loads(file.read_text())["config"]["lora_ensemble"]
    assert (said["method"]["name"], said["method"]["settings"]) == ("jitter", {"sd": 0.02})
    assert [member["draw"] for member in said["members"]] == [0, 1, 2, 3, 4]
