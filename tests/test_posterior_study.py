"""The study of docs/posteriors.md: what it would run, that it goes on, and that its tables say what its results say."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import PROJECT
from report_fixtures import write_run
from scipy import special
from study_modules import study_modules, write_records

from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import bootstrap
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.posterior import registry
from lm_eval_lora_ensemble.posterior.options import split_words
from lm_eval_lora_ensemble.posterior.plan import Settings as DrawSettings
from lm_eval_lora_ensemble.train.recipe import Recipe

SETTINGS = Settings(resamples=200)
SMALL = {"arc_easy": 120, "hellaswag": 130}
TEMPERATURE = {"map": 0.5, "swag": 0.25}


@pytest.fixture(scope="module")
def study():
    return study_modules("posterior_study", "figure", "methods", "page", "plan", "results")


def test_the_page_has_the_methods_and_nothing_made_by_hand(study):
    page = study.page.PAGE.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- posteriors: (\w+) -->\n(.*?)<!-- end -->", page, re.DOTALL))
    assert blocks.keys() == {"methods", *study.page.BLOCKS}
    assert blocks["methods"] == study.page.methods(), (
        "run: python docs/study/posteriors.py --output FOLDER --tables"
    )
    assert "A trial" not in page
    whole = study.page.filled(page, None)
    assert all(f"posteriors: {name} -->\n{study.markdown.NOT_RUN}" in whole for name in study.page.BLOCKS)


def test_one_seed_of_the_cheap_methods_comes_first_and_every_step_follows_what_it_needs(study):
    sizes = study.plan.Sizes()
    every = study.plan.steps(sizes)
    names = [step.name for step in every]
    assert len(set(names)) == len(names)
    for step in every:
        read = set(re.findall(r"\{output\}/((?:train|drawn)/[\w/]+)", " ".join(step.command))) - {step.name}
        assert all(names.index(name) < names.index(step.name) for name in step.needs)
        assert read <= _everything_before(step, every)
    # drawing reads the folder that its source's calibration writes into
    drawn = [step for step in every if step.name.startswith("drawn/")]
    own = {"ivon", "blob"}
    for step in drawn:
        method = study.methods.METHODS[step.name.rpartition("/")[2]]
        assert any(name.startswith("calibrated/") for name in step.needs) == (method.source not in own)
    assert {step.name.rpartition("/")[2] for step in drawn} > own
    first = [name for name in names if "seed_0" in name and "members_10" not in name and "_10" not in name]
    assert names[: len(first)] == first
    results = [name.split("/")[3] for name in first if name.startswith("results/")]
    assert list(dict.fromkeys(results)) == list(study.methods.METHODS)
    smaller = study.plan.steps(study.plan.Sizes(seeds=1, members=(5,)))
    assert {step.command for step in smaller} <= {step.command for step in every}


def _everything_before(step, every):
    by_name = {one.name: one for one in every}
    return set(step.needs).union(*(_everything_before(by_name[name], every) for name in step.needs))


def test_what_it_trains_and_draws_is_what_recipes_and_methods_take(study):
    seeds = set()
    for step in study.plan.steps(study.plan.Sizes()):
        if step.kind.startswith("train"):
            recipe = Recipe.load(
                step.command[3], [word.replace("{output}", "study") for word in step.command[4:]]
            )
            members = range(recipe.seed, recipe.seed + recipe.members)
            assert recipe.max_steps == 100 and recipe.keep_snapshots == 5
            seeds.add(range(members.start, members.start + 10))
        if step.kind.startswith("draw"):
            assert DrawSettings.of(registry.METHODS[step.command[3]], split_words(step.command[5:]))
    ordered = sorted(seeds, key=lambda members: members.start)
    assert len(ordered) == 3 and all(a.stop <= b.start for a, b in pairwise(ordered))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"methods": ("map", "swagg")}, "did you mean swag"),
        ({"methods": ("swag",)}, "map must be among them"),
        ({"documents": {"hellaswag": 5}}, "arc_easy=D must come first"),
        ({"training_steps": 19}, "at least 20"),
        ({"seeds": 0}, "at least one seed"),
    ],
)
def test_sizes_that_are_none_are_one_line(study, sizes, words):
    with pytest.raises(EnsembleError, match=words):
        study.plan.Sizes(**sizes)


def _step(study, code, name="train/seed_0/one", **more):
    return study.running.Step(name, "train", ("-c", code, "{output}"), 30.0, **more)


COUNT = "import sys, pathlib; p = pathlib.Path(sys.argv[1]) / 'count'; p.open('a').write('x')"


def test_a_step_runs_once_and_a_failed_one_again(study, tmp_path, capsys):
    good, bad = _step(study, COUNT), _step(study, COUNT + "; sys.exit('no such thing')", "train/seed_0/two")
    for _ in range(2):
        with pytest.raises(
            EnsembleError, match=r"two ended with status 1: no such thing; its log is .*two\.txt"
        ):
            study.running.run([good, bad], tmp_path)
    assert (tmp_path / "count").read_text() == "xxx"
    mended = _step(study, COUNT, "train/seed_0/two")
    study.running.run([good, mended], tmp_path)
    records = study.running.read_records([good, mended], tmp_path)
    assert [records[step.name].interrupted for step in (good, mended)] == [False, True]
    assert "[2/2] train/seed_0/two: about" in capsys.readouterr().out
    with pytest.raises(EnsembleError, match=r"other settings \(import sys, .*; now pass\)"):
        study.running.read_records([_step(study, "pass")], tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}'])
def test_a_file_that_is_no_record_is_named(study, tmp_path, text):
    path = tmp_path / "records" / "train" / "seed_0" / "one.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(EnsembleError, match=re.escape(str(path))):
        study.running.read_records([_step(study, COUNT)], tmp_path)


MEET = """
import pathlib, sys, time
folder, own, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]
(folder / own).touch()
deadline = time.monotonic() + 60
while not (folder / other).exists():
    time.sleep(0.01)
    assert time.monotonic() < deadline, "the other is not at work"
time.sleep(0.2)
(folder / f"{own}_ended").touch()
"""
"""Ends only while another step of its kind is at work."""


def test_so_many_steps_run_at_a_time_and_each_after_what_it_needs(study, tmp_path):
    Step = study.running.Step
    one, other = (
        Step(own, "meet", ("-c", MEET, "{output}", own, met), 1.0) for own, met in [("a", "b"), ("b", "a")]
    )
    check = "import pathlib, sys; assert pathlib.Path(sys.argv[1], 'b_ended').exists()"
    last = Step("c", "check", ("-c", check, "{output}"), 1.0, needs=("b",))
    study.running.run([last, one, other], tmp_path, jobs=2)
    records = study.running.read_records([last, one, other], tmp_path)
    assert {record.machine["steps at a time"] for record in records.values()} == {2}
    threads = _step(study, "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'])")
    for jobs in (1, 2):
        share = max(1, torch.get_num_threads() // jobs)
        with pytest.raises(EnsembleError, match=f"status 1: {share}; its log"):
            study.running.run([threads], tmp_path, jobs)


def test_a_step_beside_a_failed_one_is_finished(study, tmp_path):
    bad = _step(study, "raise SystemExit('no such thing')", "train/bad")
    good = _step(study, "import time; time.sleep(0.5)", "train/good")
    never = _step(study, COUNT, "train/never")
    with pytest.raises(EnsembleError, match="bad ended with status 1: no such thing"):
        study.running.run([bad, good, never], tmp_path, jobs=2)
    assert study.running.read_records([bad, good, never], tmp_path).keys() == {"train/good"}


STUDY = """
import pathlib, sys
from stepwise.running import Step, run
code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], 'begun').write_text(str(os.getpid())); time.sleep(60)"
run([Step("long", "sleep", ("-c", code, "{output}"), 1.0)], pathlib.Path(sys.argv[1]), jobs=2)
"""


def _begun(output):
    """Start a study of one long step, and return it and its step's process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUDY, str(output)],
        env={**os.environ, "PYTHONPATH": str(PROJECT / "docs" / "study")},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not (output / "begun").exists() or not (output / "begun").read_text():
        time.sleep(0.05)
        assert time.monotonic() < deadline
    return process, int((output / "begun").read_text())


def test_an_interrupt_ends_the_steps_too(study, tmp_path):
    process, step = _begun(tmp_path)
    process.send_signal(signal.SIGINT)  # to the study alone, as a scheduler does
    _, said = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in said and process.returncode != 0
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["long.attempt"]
    with pytest.raises(ProcessLookupError):
        os.kill(step, 0)


def test_a_step_that_outlives_a_killed_study_is_not_run_beside_itself(study, tmp_path):
    process, step = _begun(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    try:
        with pytest.raises(EnsembleError, match="another process runs this study, or a step of it"):
            study.running.run([_step(study, COUNT)], tmp_path)
    finally:
        os.kill(step, signal.SIGKILL)
    assert not (tmp_path / "count").exists()


def test_two_processes_do_not_do_each_others_steps(study, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EnsembleError, match="another process runs this study"):
            study.running.run([_step(study, COUNT)], tmp_path)
    assert not (tmp_path / "count").exists()
    study.running.run([_step(study, COUNT)], tmp_path)


def test_what_a_killed_evaluation_left_is_removed_first(study, tmp_path):
    step = _step(study, COUNT, "results/a", writes="results/a")
    (tmp_path / "results" / "a").mkdir(parents=True)
    (tmp_path / "results" / "a" / "half").touch()
    study.running.run([step], tmp_path)
    assert not (tmp_path / "results" / "a").exists()


def test_the_estimate_goes_by_what_was_measured(study):
    Step, Record = study.running.Step, study.running.Record
    steps = [
        Step(n, kind, (), guess) for n, kind, guess in [("a", "x", 5.0), ("b", "x", 20.0), ("c", "x", 50.0)]
    ]
    steps += [Step("d", "y", (), 10.0), Step("e", "x", (), 7.0)]
    records = {name: Record((), seconds, 0.0, False, {}) for name, seconds in [("a", 30.0), ("b", 80.0)]}
    records["e"] = Record((), 0.1, 0.1, True, {})
    left = study.running.estimate(steps, records)
    assert left == {"c": pytest.approx(50.0 * 5), "d": pytest.approx(10.0 * 110 / 25)}
    assert study.running.estimate(steps, {}) == {step.name: step.guess for step in steps}


# ------------------------------------------------------------------------------------------- the tables


def _saved(study, output, *, seeds=1, tasks=SMALL):
    """Write results and records of two methods as the steps would have, and return the study."""
    sizes = study.plan.Sizes(dict(tasks), seeds, (3,), ("map", "swag"), 20, 24)
    machine = {"processor": "some", "torch": "0"}
    records = {}
    for step in study.plan.steps(sizes):
        seconds = {"train": 100.0, "draw": 20.0}.get(
            step.kind.split()[0], 30.0 if "members_3" in step.name else 10.0
        )
        records[step.name] = study.running.Record(step.command, 0.5, seconds, False, machine)
        if step.name.startswith("results/"):
            _, seed, size, method, task = step.name.split("/")
            _write(output / step.name, method, int(seed[-1]), int(size[-1]), task.rpartition("_")[0], tasks)
    return study.results.Study(sizes, output, records, SETTINGS)


def _write(folder, method, seed, members, task, tasks):
    alone = [{"temperature": TEMPERATURE[method]}] * members
    scale = {"ensemble": {"temperature": TEMPERATURE[method]}, "members": alone}
    ensemble = {
        "fingerprint": f"{method}{seed}",
        "base_model": "base",
        "epoch": None,
        "calibration": {"scores": {"chars": scale}},
    }
    config = {"model": "lora-ensemble", "model_args": {"adapters": str(folder)}, "lora_ensemble": ensemble}
    write_run(folder, {task: tasks[task]}, members=members, seed=10 * seed + len(method), config=config)


def _nll(folder, temperature, members=slice(None)):
    """Each document's nll under the primary view, from the file alone."""
    (file,) = folder.glob("samples_*.jsonl")
    nll = []
    for line in map(json.loads, file.read_text().splitlines()):
        chars = [len(line["arguments"][f"gen_args_{c}"]["arg_1"]) - 1 for c in range(4)]
        p = special.softmax(np.array(line["members"])[members] / np.array(chars) / temperature, axis=1).mean(
            0
        )
        nll.append(-np.log(p[int(line["target"])]))
    return np.array(nll)


def _row(text, heading, name):
    table = text.split(f"### {heading}")[1].split("###")[0]
    head = next(line for line in table.splitlines() if line.startswith("| "))
    (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}`")]
    return dict(zip(head.split(" | "), line.split(" | "), strict=True))


def test_tables_say_what_the_files_say(study, tmp_path):
    of = _saved(study, tmp_path)
    names = {"map": "results/seed_0/members_1/map", "swag": "results/seed_0/members_3/swag"}
    heading = "N = 3, hellaswag, 130 documents, 1 seed"
    nll = {k: _nll(tmp_path / name / "hellaswag_130", TEMPERATURE[k]).mean() for k, name in names.items()}
    for name, value in nll.items():
        row = _row(study.page.primary(of), heading, name)
        assert row["nll ↓"].strip("*").startswith(f"{value:.3f} [")
        assert ("–" in row["MI"]) == (name == "map")
        assert "[" in row["OOD AUROC of entropy ↑ |"]
    gain = _row(study.page.differences(of), heading, "swag")["nll ↓"]
    assert gain.strip("*").startswith(f"{nll['swag'] - nll['map']:.3f} [".replace("-", "−"))
    assert gain.startswith("**"), "a mixture at another scale differs from one member beyond doubt"
    place, T = tmp_path / names["swag"] / "hellaswag_130", TEMPERATURE["swag"]
    alone = [_nll(place, T, [m]).mean() for m in range(3)]
    averaged = _row(study.page.averaging(of), heading, "swag")["nll ↓"].strip("*")
    assert averaged.startswith(f"{nll['swag'] - np.mean(alone):.3f} [".replace("-", "−"))
    assert "`map`" not in study.page.averaging(of)
    beside = study.page.scales(of)
    assert "summed: nll ↓" in beside and "per character: ece ↓" in beside and "Not defined" not in beside
    assert _costs(study.page.costs(of), "swag") == [1.0, 0.2, 3.0]
    study.figure.draw(of, tmp_path)
    assert (
        study.page.figure(of).endswith(f"]({study.figure.NAME})\n")
        and (tmp_path / study.figure.NAME).is_file()
    )
    said = study.page.what_was_run(of)
    assert "A trial" in said and "| `swag` | 1 of 1 |" in said and "Nothing is left" in said


def _costs(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
    return [float(cell) for cell in line.split(" | ")[1:4]]


def test_seeds_give_means_deviations_and_intervals_over_both(study, tmp_path):
    of = _saved(study, tmp_path, seeds=3)
    each = [
        _nll(tmp_path / f"results/seed_{seed}/members_3/swag/arc_easy_120", TEMPERATURE["swag"]).mean()
        for seed in range(3)
    ]
    shown = _row(study.page.primary(of), "N = 3, arc_easy, 120 documents, 3 seeds", "swag")["nll ↓"].strip(
        "*"
    )
    assert shown.startswith(f"{np.mean(each):.3f} [") and shown.endswith(f"] ± {np.std(each, ddof=1):.3f}")


def test_the_archive_of_a_study_gives_its_tables_and_has_no_texts(study, tmp_path):
    made, again = tmp_path / "study", tmp_path / "unpacked"
    of = _saved(study, made)
    write_records(made, of.records)
    archive = tmp_path / "data" / "study.tar.xz"
    study.archive.pack(made, of.records, archive)
    first = archive.read_bytes()
    study.archive.pack(made, of.records, archive)
    assert archive.read_bytes() == first
    study.archive.unpack(archive, again)
    read = study.running.read_records(study.plan.steps(of.sizes), again)
    assert read == of.records
    page = study.page.PAGE.read_text(encoding="utf-8")
    unpacked = study.results.Study(of.sizes, again, read, SETTINGS)
    assert study.page.filled(page, unpacked) == study.page.filled(page, of)
    texts = [path.read_text() for path in again.rglob("*") if path.is_file() and "records" not in path.parts]
    assert len(texts) == 8 and not any("Question" in text or str(tmp_path) in text for text in texts)


def test_what_is_not_done_is_said_and_an_oracle_of_few_documents_is_not_invented(study, tmp_path):
    of = _saved(study, tmp_path, tasks={"arc_easy": 30, "hellaswag": 12})
    missing = {name: record for name, record in of.records.items() if "swag/hellaswag" not in name}
    of = study.results.Study(of.sizes, tmp_path, missing, SETTINGS)
    said = study.page.what_was_run(of)
    assert "| `swag` | not run yet |" in said and "Left: about" in said
    beside = study.page.scales(of)
    assert "Not defined here: per character, T cross-fitted" in beside and str(tmp_path) not in beside
    assert "`swag`" not in study.page.costs(of)
    nothing = study.results.Study(of.sizes, tmp_path, {}, SETTINGS)
    page = study.page.filled(study.page.PAGE.read_text(encoding="utf-8"), nothing)
    assert page == study.page.filled(page, None)
    study.figure.draw(nothing, tmp_path)
    assert not (tmp_path / "study").exists()


def test_best_is_what_every_paired_interval_says(study):
    rng = np.random.default_rng(0)
    gold = rng.integers(4, size=300)
    noise = rng.normal(size=(300, 4))

    def judged(lead, seeds=(0,), jitter=0.0):
        parts = {}
        for seed in seeds:
            other = np.random.default_rng(seed + 1).normal(size=(300, 4)) * jitter
            p = Predictions.from_scores(noise + other + lead * np.eye(4)[gold], gold)
            parts[seed] = bootstrap(Battery(p, 15, ("nll",)), SETTINGS.plan("task", p))
        return study.values.Judged(parts, SETTINGS)

    best = study.values.best
    assert best({"a": judged(1.0), "b": judged(1.2)}, "nll", "lower") == "b"
    assert best({"a": judged(1.0), "b": judged(1.0)}, "nll", "lower") is None
    assert best({"a": judged(1.0), "b": judged(1.2)}, "nll", "") is None
    assert best({"a": judged(1.0)}, "nll", "lower") is None, "one row is better than nothing"
    assert best({"a": judged(1.0, (0,)), "b": judged(1.2, (1,))}, "nll", "lower") is None, "no seed in common"
    three = {"a": judged(1.0, (0, 1, 2), 0.3), "b": judged(1.5, (0, 1, 2), 0.3)}
    assert best(three, "nll", "lower") == "b"
    apart = {"a": judged(1.0, (0, 1, 2)), "b": judged(1.0, (0, 1, 2), 0.05)}
    assert best(apart, "nll", "lower") is None, "three seeds cannot tell so little"
