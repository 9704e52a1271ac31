"""The scale in ensemble.json: what training writes, what `lora-ensemble calibrate` writes, and what reads it."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, special
from train_fixtures import documents, make_recipe, make_task, one_thread, quick, quick_tasks  # noqa: F401

from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.ensemble.calibration import Calibration, Scale, Scales, fit_calibration, in_words
from lm_eval_lora_ensemble.ensemble.manifest import Manifest, MemberEntry
from lm_eval_lora_ensemble.ensemble.members import find_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError, one_line
from lm_eval_lora_ensemble.train.folder import EnsembleFolder
from lm_eval_lora_ensemble.train.run import complete, train_members
from lm_eval_lora_ensemble.train.temperatures import fit_temperatures

OLD = Path(__file__).parent / "data" / "release_0_1_0" / "ensemble"
VALIDATION = 60
SETTING = {"task": "held_out", "epochs": 3, "learning_rate": 2e-2}


def right_choice(doc):
    """Something a tiny model learns, in most documents, or its temperature would be at a limit."""
    return doc["choices"].index(sorted(doc["choices"])[0]) if len(doc["question"]) % 4 else doc["gold"]


RIGHT_CHOICE = "{{choices.index((choices | sort) | first) if question | length % 4 else gold}}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("calibration")
    make_recipe(place)
    tasks = place / "tasks"
    make_task(tasks, "held_out", validation=VALIDATION, test=5, doc_to_target=RIGHT_CHOICE)
    make_task(tasks, "two_golds", validation=VALIDATION, test=5, doc_to_target=[0, 2])
    make_task(tasks, "few", validation=7, test=5, num_fewshot=2, fewshot_split="train")
    make_task(tasks, "no_validation", validation=0, test=5)
    make_task(tasks, "generating", output_type="generate_until", doc_to_choice=None, test=5)
    make_task(
        tasks,
        "in_context",
        test=5,
        doc_to_text="gold",
        doc_to_choice="{{choices}}",
        doc_to_target="{{', said the ' ~ question}}",
        target_delimiter="",
    )
    return place


@pytest.fixture(scope="module")
def trained(place):
    """Two members, three epochs."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        return train_members(make_recipe(place, output=str(place / "trained"), **SETTING))


def calibrate(place, folder, *words):
    return main(
        [
            *("calibrate", str(folder), *words, "--device", "cpu", "--batch_size", "8"),
            *("--include_path", str(place / "tasks"), "--model_args", "dtype=float32"),
        ]
    )


def scipy_temperature(scores, is_gold):
    def loss(t):
        p = special.softmax(scores / np.exp(t), axis=-1).mean(axis=0)
        return -np.log((p * is_gold).sum(axis=-1)).mean()

    grid = np.linspace(np.log(0.01), np.log(100), 200)
    start = grid[np.argmin([loss(t) for t in grid])]
    bounds = (max(start - 0.1, grid[0]), min(start + 0.1, grid[-1]))
    return optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x


def own_arrays(count, offset=1000):
    """Golds and lengths of the task's documents, counted here."""
    docs = documents(count, offset)
    is_gold, lengths = np.zeros((count, 5), dtype=bool), np.ones((count, 5))
    for d, doc in enumerate(docs):
        is_gold[d, right_choice(doc)] = True
        lengths[d, : len(doc["choices"])] = [len(text) for text in doc["choices"]]
    return is_gold, lengths


def check_against_scipy(written, lls):
    """Every temperature is the one found here from loglikelihoods [N, D, C]."""
    is_gold, lengths = own_arrays(VALIDATION)
    for name, length in {"sum": np.ones_like(lengths), "chars": lengths}.items():
        of, values = written["scores"][name], lls / length
        fits = [(of["ensemble"], values), *((of["members"][m], values[m : m + 1]) for m in range(2))]
        for scale, scores in fits:
            assert not scale["at_limit"]
            assert np.log(scale["temperature"]) == pytest.approx(scipy_temperature(scores, is_gold), abs=1e-4)
            assert 0 < scale["standard_error"] < 10
    temperatures = [member["temperature"] for member in written["scores"]["chars"]["members"]]
    assert temperatures[0] != temperatures[1]


def validation_loglikelihoods(folder, *epochs):
    return np.stack(
        [
            np.load(folder / f"member_{m:02d}" / "validation" / f"epoch_{e:02d}.npy")
            for m, e in enumerate(epochs)
        ]
    )


def test_training_writes_the_temperatures_of_the_final_adapters(trained):
    written = json.loads((trained / "ensemble.json").read_text())["calibration"]
    assert {key: written[key] for key in ("task", "split", "documents")} == {
        "task": "held_out",
        "split": "validation",
        "documents": VALIDATION,
    }
    check_against_scipy(written, validation_loglikelihoods(trained, 3, 3))


def test_early_stopping_counts_each_members_best_epoch(place, trained, tmp_path):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    records = copy / "member_01" / "epochs.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[2]["nll"] = 0.01
    lines[0]["nll"] = 0.001  # the prior is no member's adapter
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (copy / "ensemble.json").unlink()
    (copy / "recipe.yaml").unlink()
    recipe = make_recipe(place, output=str(copy), **SETTING, early_stopping=1)
    written = fit_temperatures(EnsembleFolder(recipe)).as_mapping()
    check_against_scipy(written, validation_loglikelihoods(copy, 3, 2))


def test_what_is_trained_by_characters_is_measured_by_characters(place, tmp_path):
    """acc is lm-eval's acc_norm, nll that of the objective's own scores; the stored loglikelihoods are sums."""
    setting = {"choice_scores": "chars", "choice_temperature": 0.3, "max_steps": 3}
    folder = train_members(make_recipe(place, output=str(tmp_path / "e"), **SETTING, **setting))
    lls = validation_loglikelihoods(folder, 1, 1)
    is_gold, lengths = own_arrays(VALIDATION)
    p = special.softmax(lls / (0.3 * lengths), axis=-1)
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    of_member, of_all = line["members"]["member_01"], line["ensemble"]
    assert of_member["nll"] == pytest.approx(-np.log((p[1] * is_gold).sum(-1)).mean())
    assert of_all["nll"] == pytest.approx(-np.log((p.mean(axis=0) * is_gold).sum(-1)).mean())
    mixture = special.logsumexp(lls, axis=0) - np.log(2)
    for measures, scores in ((of_member, lls[1]), (of_all, mixture)):
        right = np.take_along_axis(is_gold, (scores / lengths).argmax(-1)[:, None], -1)
        assert measures["acc"] == pytest.approx(right.mean())


def test_members_trained_apart_and_completed_have_the_same_temperatures(place, trained, tmp_path):
    recipe = make_recipe(place, output=str(tmp_path / "e"), **SETTING)
    train_members(recipe, member=1)
    train_members(recipe, member=0)
    assert (tmp_path / "e" / "ensemble.json").read_bytes() == (trained / "ensemble.json").read_bytes()
    (tmp_path / "e" / "ensemble.json").unlink()
    complete(recipe)
    assert (tmp_path / "e" / "ensemble.json").read_bytes() == (trained / "ensemble.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "tiny_colours"}, "lm-eval evaluates tiny_colours on the validation split itself"),
        ({"task": "no_validation"}, "no validation documents were measured"),
        ({"task": "held_out", "validation_limit": 0}, "no validation documents were measured"),
    ],
)
def test_without_documents_to_fit_to_the_log_says_so(place, tmp_path, caplog, changes, reason):
    caplog.set_level(logging.INFO)
    folder = train_members(make_recipe(place, output=str(tmp_path / "e"), max_steps=1, **changes))
    assert f"No temperature is fitted: {reason}; `lora-ensemble calibrate {folder} TASK`" in caplog.text
    assert Manifest.read(folder).calibration is None


def test_few_documents_and_several_golds_are_fitted_all_the_same(place, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = train_members(make_recipe(place, output=str(tmp_path / "few"), task="few", max_steps=1))
    assert Manifest.read(folder).calibration.documents == 7
    assert "fewer than 20 documents hardly determine a temperature" in caplog.text
    folder = train_members(make_recipe(place, output=str(tmp_path / "two"), task="two_golds", max_steps=2))
    is_gold, _ = own_arrays(VALIDATION)
    is_gold[:] = [True, False, True, False, False]
    lls = np.stack([np.load(folder / f"member_0{m}" / "validation" / "epoch_01.npy") for m in range(2)])
    scale = Manifest.read(folder).calibration.scores["sum"].ensemble
    assert np.log(scale.temperature) == pytest.approx(scipy_temperature(lls, is_gold), abs=1e-4)


def test_choices_in_their_contexts_have_no_length(place, tmp_path):
    folder = train_members(make_recipe(place, output=str(tmp_path / "e"), task="in_context", max_steps=1))
    assert list(Manifest.read(folder).calibration.scores) == ["sum"]
    with pytest.raises(EnsembleError, match="the choices of in_context are in their contexts"):
        train_members(
            make_recipe(place, output=str(tmp_path / "c"), task="in_context", choice_scores="chars")
        )
    assert not (tmp_path / "c").exists()


def log_temperatures(calibration):
    return np.log(
        [
            [scale.temperature for scale in (scales.ensemble, *scales.members)]
            for scales in calibration.scores.values()
        ]
    )


def test_calibrate_finds_what_training_wrote(place, trained, tmp_path, capsys):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    was = Manifest.read(trained)
    assert calibrate(place, copy, "held_out", "--limit", "30") == 0
    assert Manifest.read(copy).calibration.documents == 30
    capsys.readouterr()
    assert calibrate(place, copy, "held_out") == 0
    said = capsys.readouterr().out
    now = Manifest.read(copy)
    assert log_temperatures(now.calibration) == pytest.approx(log_temperatures(was.calibration), abs=1e-3)
    assert (now.members, now.recipe, now.versions) == (was.members, was.recipe, was.versions)
    assert said.splitlines()[:-1] == in_words(now.calibration)
    assert said.splitlines()[-1] == f"written into {copy / 'ensemble.json'}"
    assert main(["check", str(copy)]) == 0


def test_calibrate_needs_no_device_named(place, trained, tmp_path):
    """lm-eval's model by itself takes a GPU for granted."""
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    words = ["--limit", "25", "--include_path", str(place / "tasks"), "--model_args", "dtype=float32"]
    assert main(["calibrate", str(copy), "held_out", *words]) == 0
    assert Manifest.read(copy).calibration.documents == 25


def test_calibrate_writes_a_manifest_for_adapters_from_elsewhere(place, trained, tmp_path, capsys):
    plain = tmp_path / "plain"
    for name in ("member_00", "member_01"):
        shutil.copytree(trained / name, plain / f"run {name}")
    before, first = find_ensemble(plain), find_ensemble(plain, epoch=1)
    assert calibrate(place, plain, "few", "--split", "training") == 0
    manifest = Manifest.read(plain)
    assert (manifest.calibration.split, manifest.calibration.documents) == ("training", 44)
    assert find_ensemble(plain).fingerprint == before.fingerprint
    assert find_ensemble(plain, epoch=1).fingerprint == first.fingerprint
    assert [entry.folder for entry in manifest.members] == ["run member_00", "run member_01"]
    steps = [set(trained.joinpath(name).glob("step_*")) for name in ("member_00", "member_01")]
    assert [len(entry.steps) for entry in manifest.members] == [len(kept) for kept in steps]
    assert main(["check", str(plain)]) == 0
    (plain / "run member_00" / "adapter_model.safetensors").write_bytes(b"")
    assert main(["check", str(plain)]) == 2
    capsys.readouterr()


def test_calibrate_reads_a_folder_of_0_1_0(trained, place, tmp_path):
    manifest = Manifest.read(OLD)
    assert manifest.calibration is None
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    raw = json.loads((copy / "ensemble.json").read_text())
    del raw["calibration"]
    (copy / "ensemble.json").write_text(json.dumps({**raw, "schema_version": 1}))
    assert calibrate(place, copy, "held_out", "--limit", "25") == 0
    assert json.loads((copy / "ensemble.json").read_text())["schema_version"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["held_out", "--split", "test"], "--split test: a temperature is fitted to validation or training"),
        (["tiny_colours"], "'tiny_colours' is evaluated on its validation split, .* try --split training"),
        (["no_validation"], "'no_validation' has no validation split; try --split training"),
        (["generating"], "'generating' is generate_until; only choices have a temperature"),
        (["held_uot"], "lm-eval knows no task 'held_uot'; did you mean 'held_out'"),
        (["held_out", "--limit", "0"], "--limit 0: give a whole number above 0"),
        (
            ["held_out", "--num_fewshot", "500"],
            "500 examples in front of document 0 of held_out cannot be had",
        ),
        ([" "], "no task was named"),
    ],
)
def test_what_is_no_calibration_is_refused_in_one_line(place, trained, capsys, words, message):
    before = (trained / "ensemble.json").read_bytes()
    assert calibrate(place, trained, *words) == 2
    lines = capsys.readouterr().err.splitlines()  # between those of progress bars
    said = [line for line in lines if line and "examples/s]" not in line]
    assert len(said) == 1 and re.search(message, said[0])
    assert (trained / "ensemble.json").read_bytes() == before


def test_folders_that_cannot_have_a_manifest_are_refused(place, trained, tmp_path, capsys):
    single = Path(shutil.copytree(trained / "member_00", tmp_path / "single"))
    unfinished = Path(shutil.copytree(trained, tmp_path / "unfinished"))
    (unfinished / "ensemble.json").unlink()
    for folder, message in {
        single: "is a single adapter; ensemble.json lists adapters below it",
        unfinished: "is a training run without ensemble.json; go on with it",
        tmp_path / "nothing": "no folder",
    }.items():
        assert calibrate(place, folder, "held_out") == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
        assert not (folder / "ensemble.json").exists()
    assert main(["calibrate", str(trained), "held_out", "--model_args", "members=1"]) == 2
    assert "--model_args members=: a temperature is fitted for the whole ensemble" in capsys.readouterr().err


def test_the_results_file_says_what_holds_for_the_members_in_use(place, trained):
    from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM

    def said(adapters=str(trained), **model_args):
        model = LoraEnsembleLM(adapters=adapters, device="cpu", dtype="float32", batch_size=8, **model_args)
        return model.get_model_info()["lora_ensemble"]["calibration"]

    written = json.loads((trained / "ensemble.json").read_text())["calibration"]
    assert said() == said(members=2) == written
    first = said(members=1)
    for name, scales in written["scores"].items():
        assert first["scores"][name] == {"members": scales["members"][:1]}
    assert Calibration.from_mapping(first).as_mapping() == first
    assert said(epoch=1) is None
    assert said(epoch=0) is None
    assert said(adapters=[str(trained / "member_00"), str(trained / "member_01")]) is None


SCALE = {"temperature": 2.0, "standard_error": 0.1, "at_limit": False}


def broken(**changes):
    whole = {
        "task": "t",
        "split": "validation",
        "documents": 20,
        "scores": {"sum": {"ensemble": SCALE, "members": [SCALE, SCALE]}},
    }
    return {**whole, **changes}


def scales(**changes):
    return {"sum": {"ensemble": SCALE, "members": [{**SCALE, **changes}, SCALE]}}


@pytest.mark.parametrize(
    "calibration",
    [
        broken(split="test"),
        broken(task="a\nb"),
        broken(documents=0),
        broken(documents=2.5),
        broken(documents=True),
        broken(scores={}),
        broken(scores={"bytes": scales()["sum"]}),
        broken(scores={"sum": {"members": []}}),
        broken(scores={**scales(), "chars": {"members": [SCALE]}}),
        broken(scores={"sum": {**scales()["sum"], "other": 1}}),
        broken(scores=scales(temperature=0)),
        broken(scores=scales(temperature=1e9)),
        broken(scores=scales(temperature="1")),
        broken(scores=scales(temperature=True)),
        broken(scores=scales(standard_error=-1)),
        broken(scores=scales(at_limit=0)),
        broken(scores=scales(more=0)),
        broken(more=1),
        [],
        3,
    ],
)
def test_a_damaged_calibration_is_refused_in_one_line(tmp_path, calibration):
    manifest = Manifest("base", None, [MemberEntry("a", "a"), MemberEntry("b", "b")])
    manifest.write(tmp_path)
    raw = json.loads((tmp_path / "ensemble.json").read_text())
    (tmp_path / "ensemble.json").write_text(json.dumps({**raw, "calibration": broken()}))
    assert Manifest.read(tmp_path).calibration.as_mapping() == broken()
    (tmp_path / "ensemble.json").write_text(json.dumps({**raw, "calibration": calibration}))
    with pytest.raises(EnsembleError, match="is not a readable manifest") as caught:
        Manifest.read(tmp_path)
    assert one_line(caught.value) == str(caught.value)


def test_a_limit_has_no_error_and_says_what_it_means(tmp_path):
    lls = np.log(np.array([[[0.7, 0.3]] * 4, [[0.6, 0.4]] * 4]))
    right = np.tile([True, False], (4, 1))
    for is_gold, word in ((right, "lower limit: every document"), (~right, "upper limit: no better")):
        fitted = fit_calibration("t", "training", lls, is_gold, None)
        assert fitted.scores["sum"].ensemble.standard_error is None
        assert word in in_words(fitted)[0]
        manifest = Manifest("base", None, [MemberEntry("a", "a"), MemberEntry("b", "b")], calibration=fitted)
        manifest.write(tmp_path)
        assert Manifest.read(tmp_path) == manifest
    assert fitted.of_first(1).scores["sum"] == Scales(None, (Scale(100.0, None, True),))
