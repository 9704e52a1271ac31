"""``lm_eval --wandb_args``: our metrics, tasks' and groups', and the report; offline, read from wandb's own log."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from harness_tasks import write_tasks

from lm_eval_lora_ensemble.cli import main

pytest.importorskip(
    "wandb", reason="needs wandb, which is not among the development requirements (pip install wandb)"
)

RUN = "ensemble-run"
OURS = (
    "nll",
    "brier_score",
    "ece",
    "rms_ce",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "members",
)


def records(folder: Path) -> Iterator[Any]:
    """Yield the records of every offline run below a folder, oldest first: protobuf in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(folder.rglob("*.wandb"), key=lambda path: path.parent.name):
        data, place, parts = file.read_bytes(), 7, b""
        assert data[:4] == b":W&B"
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:  # no header fits behind here
                place += left
                continue
            length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
            if not kind:
                return
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield Record.FromString(parts)
                parts = b""


def logged(folder: Path) -> dict[str, Any]:
    """Return the last value of everything that ``run.log`` was given."""
    found: dict[str, Any] = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:  # a table is several: its file's path, its rows …
                name = item.key or "/".join(item.nested_key)
                found[name] = json.loads(item.value_json)
    return found


def environment(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return {**kept, "WANDB_DIR": str(folder), "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true"}


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def evaluated(ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ./results, and in ./wandb what lm-eval's own command logged of them."""
    folder = tmp_path_factory.mktemp("wandb")
    done = run(
        *("-m", "lm_eval", "run", "--model", "lora-ensemble", "--model_args", f"adapters={ensemble}"),
        *(
            "--device",
            "cpu",
            "--tasks",
            "both,varies_context",
            "--include_path",
            str(write_tasks(folder / "tasks")),
        ),
        *(
            "--log_samples",
            "--output_path",
            "results",
            "--wandb_args",
            f"mode=offline,project=ensembles,id={RUN}",
        ),
        folder=folder,
    )
    assert "Logging to W&B failed" not in done.stdout + done.stderr, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def results(evaluated: Path) -> dict[str, Any]:
    (file,) = (evaluated / "results").rglob("results_*.json")
    return json.loads(file.read_text())


def test_every_metric_of_ours_is_logged_for_tasks_and_groups(evaluated, results):
    found = logged(evaluated)
    for name in ("both", "plain_a", "plain_b", "varies_context"):
        for metric in OURS:
            assert found[f"{name}/{metric}"] == pytest.approx(results["results"][name][f"{metric},none"]), (
                metric
            )
    # pooled over documents: not the mean of the parts that lm-eval's own group rows are
    parts = [found[f"{name}/ece"] for name in ("plain_a", "plain_b")]
    assert found["both/ece"] not in parts and found["both/members"] == 3
    assert found["both/nll"] == pytest.approx((21 * found["plain_a/nll"] + 9 * found["plain_b/nll"]) / 30)


def test_group_rows_are_in_the_table_of_groups(evaluated, results):
    found = logged(evaluated)
    file = next(evaluated.rglob(Path(found["evaluation/group_eval_results/path"]).name))
    table = json.loads(file.read_text())
    rows = {
        row[table["columns"].index("Metric")]: row[table["columns"].index("Value")] for row in table["data"]
    }
    assert {row[0] for row in table["data"]} == {"both"}
    for metric in OURS:
        assert float(rows[metric]) == pytest.approx(results["groups"]["both"][f"{metric},none"])


def test_samples_are_logged_beside_them(evaluated):
    found = logged(evaluated)
    rows = {name: found[f"{name}_eval_results/nrows"] for name in ("plain_a", "plain_b", "varies_context")}
    assert rows == {"plain_a": 21, "plain_b": 9, "varies_context": 12}


def test_the_report_goes_along_as_the_guide_says(evaluated, monkeypatch):
    """The guide's own lines, on a real report, go on with lm-eval's run."""
    monkeypatch.chdir(evaluated)
    assert main(["report", "results", "--figures", "0", "--resamples", "20"]) == 0
    guide = (PROJECT / "docs" / "guides" / "card.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in guide.split("```python\n")[1:] if "wandb.init" in block]
    (evaluated / "send.py").write_text(code.replace("wandb.init(", 'wandb.init(mode="offline", '))
    assert f'id="{RUN}"' in code
    run("send.py", folder=evaluated)
    found = logged(evaluated)
    assert found["report/_type"] == "html-file"
    assert next(evaluated.rglob(Path(found["report/path"]).name)).stat().st_size > 10_000
    artifacts = [r.artifact for r in records(evaluated) if r.WhichOneof("record_type") == "artifact"]
    (report,) = [one for one in artifacts if one.type == "report"]
    assert {entry.path for entry in report.manifest.contents} >= {
        "report.html",
        "report.json",
        "leaderboard.csv",
    }
