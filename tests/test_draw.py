"""``lora-ensemble draw``: what lies in the folder, and that it is the same however it came about."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from filelock import FileLock
from posterior_fixtures import CONFIG, WEIGHTS, files, make_run, weights
from safetensors.torch import save_file
from test_model import PAIRS, hf, instances, lora

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.ensemble.manifest import Manifest
from lm_eval_lora_ensemble.ensemble.members import find_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.draw import draw
from lm_eval_lora_ensemble.posterior.methods.dropout import DropoutPosterior
from lm_eval_lora_ensemble.report.entries import make_entries

HARNESS = Path(__file__).with_name("posterior_kill_harness.py")


@pytest.fixture(scope="module")
def run(ensemble, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", ensemble / "member_00", members=2)


@pytest.fixture(scope="module")
def one(run):
    return run / "member_00"


WAYS = {
    "snapshot": {"draws": 3},
    "swa": {},
    "swag": {"draws": 3, "K": 3},
    "dropout": {"draws": 3, "p": 0.3},
}


@pytest.fixture(scope="module", params=WAYS)
def drawn(request, one, tmp_path_factory):
    folder = draw(
        request.param, one, output=tmp_path_factory.mktemp(request.param) / "d", **WAYS[request.param]
    )
    return request.param, folder


def test_peft_loads_every_draw_and_the_engine_scores_it_as_hf_does(drawn, llama):
    _, folder = drawn
    ours = lora(folder, batch_size=4).loglikelihood(instances(PAIRS), disable_tqdm=True)
    members = sorted(folder.glob("member_*"))
    for i, member in enumerate(members):
        theirs = hf(llama, member, batch_size=4).loglikelihood(instances(PAIRS), disable_tqdm=True)
        np.testing.assert_allclose([v.members[i] for v, _ in ours], [v for v, _ in theirs], atol=1e-4)
        model = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(llama), member
        )
        loaded = peft.get_peft_model_state_dict(model)
        for name, tensor in weights(member).items():
            assert torch.equal(loaded[name], tensor)
    if len(members) > 1:
        assert np.std([v.members for v, _ in ours], axis=1).max() > 0.01


def test_check_passes_and_the_manifest_tells_it_all(drawn, one, capsys):
    name, folder = drawn
    assert cli.main(["check", str(folder)]) == 0
    assert "WARNING" not in capsys.readouterr().out
    found = Manifest.read(folder)
    assert (found.method.name, found.method.seed) == (name, 0)
    assert found.method.options.items() >= {k: v for k, v in WAYS[name].items() if k != "draws"}.items()
    assert [entry.draw for entry in found.members] == list(range(len(found.members)))
    of = {entry.provenance.name for entry in found.members}
    assert of == ({f"member_00/epoch_{n:02d}" for n in (4, 5, 6)} if name == "snapshot" else {"member_00"})
    by_folder = {member.folder: member.sha256 for member in find_ensemble(one).members}
    for entry in found.members:
        if name == "dropout":
            assert entry.provenance.sha256 == by_folder[Path(entry.provenance.folder)]
        assert set(entry.files) == {f"{entry.name}/{file}" for file in (CONFIG, WEIGHTS)}


def test_the_same_seed_gives_the_same_bytes_and_another_others(one, tmp_path):
    for method, options in (("swag", {}), ("dropout", {"p": 0.3})):
        for name, seed in (("a", 3), ("b", 3), ("c", 4)):
            draw(method, one, output=tmp_path / method / name, seed=seed, draws=2, **options)
        a, b, c = (files(tmp_path / method / name) for name in "abc")
        assert a == b
        assert all(a[f"member_0{i}/{WEIGHTS}"] != c[f"member_0{i}/{WEIGHTS}"] for i in range(2))


def test_the_first_five_of_ten_are_the_five(run, one, tmp_path):
    for method, source, five, ten in (
        ("swag", one, {"draws": 5}, {"draws": 10}),
        ("dropout", run, {"draws_per_member": 2, "p": 0.3}, {"draws_per_member": 4, "p": 0.3}),
        ("multiswag", run, {"draws": 4, "K": 3}, {"draws": 8, "K": 3}),
    ):
        few = files(draw(method, source, output=tmp_path / f"{method}5", **five))
        many = files(draw(method, source, output=tmp_path / f"{method}10", **ten))
        kept = [name for name in few if name.startswith("member_")]
        assert len(kept) == 3 * (5 if method == "swag" else 4)
        assert all(few[name] == many[name] for name in kept)


def test_multiswag_is_the_swag_of_every_member_with_equal_shares(run, tmp_path):
    folder = draw("multiswag", run, output=tmp_path / "m", draws=4, K=3, scale=0)
    entries = Manifest.read(folder).members
    assert [(e.provenance.name, e.draw) for e in entries] == [
        ("member_00", 0), ("member_01", 0), ("member_00", 1), ("member_01", 1)
    ]  # fmt: skip
    for member in (0, 1):
        mean = weights(draw("swa", run, member=member, output=tmp_path / f"swa{member}") / "member_00")
        for number in (member, member + 2):
            found = weights(folder / f"member_{number:02d}")
            assert all(torch.equal(found[name], mean[name]) for name in mean)
    assert len(Manifest.read(draw("multiswag", run, output=tmp_path / "all", K=3)).members) == 10


def test_a_scale_of_0_scores_as_swa_does(one, tmp_path):
    swa = lora(draw("swa", one, output=tmp_path / "swa")).loglikelihood(instances(PAIRS), disable_tqdm=True)
    swag = draw("swag", one, output=tmp_path / "swag", scale=0, draws=1)
    zero = lora(swag).loglikelihood(instances(PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([float(v) for v, _ in zero], [float(v) for v, _ in swa], atol=1e-4)


def test_adapters_in_half_precision_are_drawn_in_float32_or_copied(ensemble, tmp_path):
    half = make_run(tmp_path / "half", ensemble / "member_00", dtype=torch.bfloat16)
    swag = weights(draw("swag", half, output=tmp_path / "swag", draws=1) / "member_00")
    copied = weights(draw("snapshot", half, output=tmp_path / "snapshot", draws=1) / "member_00")
    assert {tensor.dtype for tensor in swag.values()} == {torch.float32}
    last = weights(half / "member_00" / "epoch_06")
    assert all(
        copied[name].dtype == torch.bfloat16 and torch.equal(copied[name], last[name]) for name in last
    )


def test_a_base_that_no_adapter_names_is_named_by_every_draw(ensemble, llama, tmp_path, edit_json):
    nameless = shutil.copytree(ensemble / "member_00", tmp_path / "nameless")
    edit_json(nameless / CONFIG, base_model_name_or_path=None)
    with pytest.raises(EnsembleError, match="names no base model; give pretrained="):
        draw("dropout", nameless, p=0.1, output=tmp_path / "d")
    folder = draw("dropout", nameless, p=0.1, draws=2, pretrained=str(llama), output=tmp_path / "d")
    assert find_ensemble(folder).base_model == str(llama)


# ---------------------------------------------------------------------------------------- going on, and not


class StopError(Exception):
    pass


@pytest.fixture
def stopped(one, tmp_path, monkeypatch):
    """A folder of five draws, two of which are there."""
    draw_one = DropoutPosterior.draw
    count = iter(range(5))

    def draw_two(self, generator):
        if next(count) == 2:
            raise StopError
        return draw_one(self, generator)

    with monkeypatch.context() as patch:
        patch.setattr(DropoutPosterior, "draw", draw_two)
        with pytest.raises(StopError):
            draw("dropout", one, p=0.3, draws=5, output=tmp_path / "d")
    assert [path.name for path in sorted((tmp_path / "d").glob("member_*"))] == ["member_00", "member_01"]
    return tmp_path / "d"


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(stopped, one, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in stopped.glob("member_*/*")}
    draw("dropout", one, p=0.3, draws=5, output=stopped)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert files(stopped) == files(draw("dropout", one, p=0.3, draws=5, output=tmp_path / "whole"))
    assert not (stopped / ".drawing").exists()
    monkeypatch.setattr(DropoutPosterior, "draw", lambda *_: pytest.fail("it is all there"))
    draw("dropout", one, p=0.3, draws=5, output=stopped)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"p": 0.2}, "p: 0.3 → 0.2"),
        ({"seed": 1}, "seed: 0 → 1"),
        ({"draws": 6}, "draws: 5 → 6"),
        ({"adapters": "member_01"}, "sources changed"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_in_the_same_folder_are_refused(stopped, one, change, said, finished):
    settings = {"p": 0.3, "draws": 5, "output": stopped}
    if finished:
        draw("dropout", one, **settings)
    before = files(stopped)
    adapters = one.parent / change.get("adapters", one.name)
    with pytest.raises(EnsembleError, match=said):
        draw("dropout", adapters, **{**settings, **{k: v for k, v in change.items() if k != "adapters"}})
    assert files(stopped) == before


def test_what_is_not_finished_is_not_taken_for_a_smaller_ensemble(stopped, capsys):
    with pytest.raises(EnsembleError, match="draws that are not finished; run the same"):
        find_ensemble(stopped)
    assert cli.main(["check", str(stopped)]) == 2
    assert "not finished" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [False, True])
def test_a_draw_that_was_changed_is_named(stopped, one, finished):
    if finished:
        draw("dropout", one, p=0.3, draws=5, output=stopped)
    state = weights(stopped / "member_01")
    save_file({name: tensor * 2 for name, tensor in state.items()}, stopped / "member_01" / WEIGHTS)
    with pytest.raises(EnsembleError, match=rf"member_01/{WEIGHTS} is not what was drawn; remove"):
        draw("dropout", one, p=0.3, draws=5, output=stopped)


def test_two_runs_do_not_write_one_folder(stopped, one):
    with (
        FileLock(stopped / ".drawing" / "members.lock"),
        pytest.raises(EnsembleError, match="another process"),
    ):
        draw("dropout", one, p=0.3, draws=5, output=stopped)


def test_the_output_may_be_reached_by_any_path(one, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "work")
    drawn = [
        draw("dropout", one, p=0.1, draws=1, output=place) for place in ("../d", tmp_path / "link" / "d")
    ]
    assert files(drawn[0]) == files(drawn[1])
    assert find_ensemble(tmp_path / "disk" / "d").fingerprint == find_ensemble(tmp_path / "d").fingerprint


def test_what_a_kill_left_of_the_first_file_is_in_nobodys_way(one, tmp_path):
    (tmp_path / "d").mkdir()
    half = tmp_path / "d" / ".draw.json.123.tmp"
    half.touch()
    draw("dropout", one, p=0.1, draws=1, output=tmp_path / "d")
    assert not half.exists()


def test_an_error_leaves_nothing_behind(one, tmp_path, monkeypatch):
    with pytest.raises(EnsembleError, match="give p="):
        draw("dropout", one, output=tmp_path / "d")
    huge = {"draw": lambda self, _: {name: t.clone() / 0 for name, t in self.adapter.state.items()}}
    monkeypatch.setattr(DropoutPosterior, "draw", huge["draw"])
    with pytest.raises(EnsembleError, match=r"draw 0 of dropout has a value in .* that is not finite"):
        draw("dropout", one, p=0.5, output=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_folder_of_something_else_is_left_alone(one, run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EnsembleError, match=r"holds notes\.txt but no draw\.json"):
        draw("dropout", one, p=0.1, output=tmp_path)
    before = sorted(run.rglob("*"))
    for place in (run, run / "drawn", run / "member_00" / "drawn", tmp_path / "link"):
        if place.name == "link":
            place.symlink_to(run)
        with pytest.raises(EnsembleError, match="which is drawn from; give a folder outside it"):
            draw("dropout", run, p=0.1, member=0, output=place)
    assert sorted(run.rglob("*")) == before
    with pytest.raises(EnsembleError, match=r"notes\.txt is a file; name a folder"):
        draw("dropout", one, p=0.1, output=tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("swagg", {}, "no method 'swagg' draws members; did you mean swag"),
        ("swag", {}, r"has 2 members and swag draws from one; say which with member=0 … member=1"),
        ("swag", {"sacle": 1}, "swag has no option 'sacle'; did you mean scale"),
        ("swag", {"draws": 4, "draws_per_member": 2}, "two ways to say one thing"),
        ("swag", {"draws": 0, "member": 0}, "draws=0: give a whole number from 1"),
        ("swag", {"task": "arc_easy", "member": 0}, "no option 'task'"),
        ("multiswag", {"draws": 5, "K": 3}, "cannot be shared equally by the 2 members"),
        ("snapshot", {"draws": 7, "member": 0}, "snapshot has 6 members to give here, not 7"),
        ("swa", {"draws_per_member": 2}, "swa has 1 members to give here, not 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run, tmp_path, method, settings, said, capsys):
    words = [f"{key}={value}" for key, value in settings.items()]
    assert cli.main(["draw", method, str(run), *words, f"output={tmp_path / 'd'}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    with pytest.raises(EnsembleError, match=said):
        raise EnsembleError(line)
    assert not (tmp_path / "d").exists()


def test_the_command_says_how_to_go_on(one, tmp_path, capsys):
    assert cli.main(["draw", "swag", str(one), "K=3", "draws=2", f"output={tmp_path / 'd'}"]) == 0
    said = capsys.readouterr().out
    assert f"Drew 2 members by swag (scale 0.5, K 3, snapshots 6) in {tmp_path / 'd'}" in said
    assert f"adapters={tmp_path / 'd'}" in said
    assert cli.main(["draw", "swag", str(one), "K"]) == 2
    assert "'K' is not of the form key=value" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- what later stages say


def test_results_and_reports_name_the_method_with_its_settings(run, one, tmp_path):
    from report_fixtures import write_run

    from lm_eval_lora_ensemble.analysis.runs import load_runs

    for name, member in (("a", 0), ("b", 1)):
        draw("swag", run, member=member, K=3, draws=5, output=tmp_path / name)
        info = lora(tmp_path / name).get_model_info()["lora_ensemble"]
        assert info["method"]["settings"] == {"scale": 0.5, "K": 3, "snapshots": 6}
        assert info["members"][4]["draw"] == 4
        assert info["members"][4]["source"]["name"] == f"member_0{member}"
        config = {"model": "lora-ensemble", "model_args": {"adapters": f"x/{name}"}, "lora_ensemble": info}
        write_run(tmp_path / "results" / name, {"one": 9}, config=json.loads(json.dumps(config, default=str)))
    labels = [entry.label for entry in make_entries(load_runs(tmp_path / "results"))]
    words = "swag (scale 0.5, K 3, snapshots 6), 5 draws"
    assert sorted(labels) == [f"{words} of a", f"{words} of b"]
    assert [entry.label for entry in make_entries(load_runs(tmp_path / "results" / "a"))] == [words]


# ------------------------------------------------------------------------------------------------- kill


@pytest.mark.parametrize(
    "kills", [pytest.param(6, id="6-kills"), pytest.param(40, id="40-kills", marks=pytest.mark.long)]
)
def test_sigkill_at_any_instant_changes_nothing(run, tmp_path, kills):
    settings = {"K": 3, "draws": 24}
    reference = draw("multiswag", run, output=tmp_path / "reference", **settings)
    words = [str(run), str(tmp_path / "killed"), json.dumps(settings), str(kills), "1"]
    done = subprocess.run(
        [sys.executable, str(HARNESS), *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert [death["signal"] for death in report["deaths"]] == [signal.SIGKILL] * kills
    assert len({death["phase"] for death in report["deaths"]}) > 1
    assert files(tmp_path / "killed") == files(reference)
    assert "Traceback" not in (tmp_path / "killed.log").read_text()
