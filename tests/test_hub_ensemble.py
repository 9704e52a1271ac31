"""An ensemble in one repository of the Hub: found in its cache, downloaded as far as it is read, checked as ever."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import COMMIT, into_cache, serve
from safetensors.numpy import load_file, save_file
from test_model import PAIRS

from lm_eval_lora_ensemble import load_ensemble
from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.disk import checksums
from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME, Manifest, MemberEntry, Method
from lm_eval_lora_ensemble.ensemble.members import find_ensemble, find_sources
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM

NAME = "org/capitals-ensemble"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def scaled(weights: Path, factor: float) -> None:
    tensors = {name: tensor * np.float32(factor) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def indented(config: Path, spaces: int) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()), indent=spaces))


@pytest.fixture(scope="module")
def folder(ensemble: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble folder: a manifest, two kept epochs a member with weights of their own, and a file nobody reads."""
    target = tmp_path_factory.mktemp("hub") / "ensemble"
    shutil.copytree(ensemble, target)
    for i in range(3):
        member = target / f"member_{i:02d}"
        for epoch in (1, 2):
            kept = member / f"epoch_{epoch:02d}"
            kept.mkdir()
            for file in ADAPTER:
                shutil.copy(ensemble / f"member_{(i + epoch) % 3:02d}" / file, kept / file)
            # no two files with the same bytes, which the Hub's cache would fetch once
            indented(kept / ADAPTER[0], 1 + 3 * epoch + i)
            scaled(kept / ADAPTER[1], 0.3 * epoch + i / 8)
        indented(member / ADAPTER[0], 1 + i)
        (member / "README.md").write_text(f"member {i}")
    (target / "metrics.jsonl").write_text("{}\n")
    entries = []
    for i in range(3):
        name = f"member_{i:02d}"
        kept = {epoch: f"{name}/epoch_{epoch:02d}" for epoch in (1, 2)}
        files = {
            k: v for place in (name, *kept.values()) for k, v in checksums(target / place, target).items()
        }
        entries.append(MemberEntry(name, name, 40 + i, kept, files))
    recipe = {"task": ["plain_a"], "rank": 4, "output": "/home/somebody/ensemble"}
    Manifest(str(llama), None, entries, recipe=recipe, method=Method("swag", {"scale": 0.5}, seed=3)).write(
        target
    )
    return target


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # where no folder is called org
    return tmp_path / "cache"


def test_it_scores_what_the_folder_scores(folder, cache):
    snapshot = into_cache(folder, cache, NAME)
    there = load_ensemble(adapters=NAME, device="cpu")
    here = load_ensemble(adapters=folder, device="cpu")
    texts = [list(part) for part in zip(*PAIRS, strict=True)]
    np.testing.assert_array_equal(there.loglikelihoods(*texts), here.loglikelihoods(*texts))
    assert there.members == ("member_00", "member_01", "member_02")
    model = there.model
    assert [member.folder for member in model.ensemble.members] == [snapshot / name for name in there.members]
    assert [member.seed for member in model.ensemble.members] == [40, 41, 42]
    # what the manifest says reaches the results file, by way of a Hub id too
    info = model.get_model_info()["lora_ensemble"]
    assert info["fingerprint"] == here.model.ensemble.fingerprint
    assert info["recipe"] == {"task": ["plain_a"], "rank": 4} and info["method"]["name"] == "swag"


def test_members_epochs_and_the_prior(folder, cache):
    into_cache(folder, cache, NAME)
    final, local = find_ensemble(NAME), find_ensemble(folder)
    assert final.fingerprint == local.fingerprint
    assert len(LoraEnsembleLM(adapters=NAME, members=2, device="cpu").ensemble.members) == 2
    first = find_ensemble(NAME, epoch=1)
    assert first.fingerprint == find_ensemble(folder, epoch=1).fingerprint != final.fingerprint
    assert find_ensemble(NAME, epoch=0).members == ()
    with pytest.raises(EnsembleError, match=r"has no epoch 3; kept epochs: 1, 2"):
        find_ensemble(NAME, epoch=3)


def test_a_branch_a_tag_or_a_commit(folder, cache, tmp_path):
    into_cache(folder, cache, NAME)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    said = Manifest.read(other)
    said.members.pop()
    said.write(other)
    into_cache(other, cache, NAME, commit="2" * 40, ref="v2")
    assert [len(find_ensemble(f"{NAME}{of}").members) for of in ("", "@main", "@v2", f"@{COMMIT}")] == [
        3,
        3,
        2,
        3,
    ]
    with pytest.raises(EnsembleError, match=r"org/capitals-ensemble@v3' is no local folder"):
        find_ensemble(f"{NAME}@v3")


def test_check_of_a_hub_id(folder, cache, capsys):
    snapshot = into_cache(folder, cache, NAME)
    assert main(["check", NAME]) == 0
    said = capsys.readouterr().out
    assert "member_02: ok" in said and "7 files match their checksums, epochs 1, 2" in said
    blob = (snapshot / "member_01" / "epoch_01" / ADAPTER[0]).resolve()
    blob.write_text(json.dumps({**json.loads(blob.read_text()), "lora_alpha": 9}))
    assert main(["check", NAME]) == 2
    assert "member_01: BROKEN" in capsys.readouterr().out


def test_draw_from_a_hub_id(folder, cache):
    into_cache(folder, cache, NAME)
    assert main(["draw", "dropout", NAME, "draws_per_member=1", "p=0.1", "output=drawn"]) == 0
    assert main(["draw", "snapshot", NAME, "draws_per_member=1", "output=kept"]) == 0
    assert main(["draw", "dropout", str(folder), "draws_per_member=1", "p=0.1", "output=local"]) == 0
    assert find_ensemble("drawn").fingerprint == find_ensemble("local").fingerprint
    assert len(find_ensemble("kept").members) == 3


def test_an_adapter_is_still_one_member(ensemble, cache):
    snapshot = into_cache(ensemble / "member_01", cache, "org/adapter")
    (member,) = find_ensemble("org/adapter").members
    assert member.folder == snapshot and member.sha256 == find_ensemble(ensemble).members[1].sha256
    into_cache(ensemble / "member_02", cache, "org/other")
    assert len(find_ensemble("org/adapter@main; org/other").members) == 2


# ---------------------------------------------------------------------------------------- what is refused


def refused(*arguments: object, **keys: object) -> str:
    with pytest.raises(EnsembleError) as caught:
        find_ensemble(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_in_the_cache_offline(cache):
    said = refused(NAME)
    assert f"{NAME!r} is no local folder and could not be had from the Hugging Face Hub" in said
    assert "HF_HUB_OFFLINE forbids to ask" in said and f"hf download {NAME}" in said and str(cache) in said


def test_a_repository_without_adapters(folder, cache, tmp_path):
    without = Path(shutil.copytree(folder, tmp_path / "without"))
    (without / FILE_NAME).unlink()
    into_cache(without, cache, NAME)
    assert f"{NAME} on the Hugging Face Hub has neither ensemble.json nor adapter_config.json" in refused(
        NAME
    )


def test_a_member_that_was_not_uploaded(folder, cache, tmp_path):
    part = Path(shutil.copytree(folder, tmp_path / "part"))
    shutil.rmtree(part / "member_01")
    into_cache(part, cache, NAME)
    said = refused(NAME)
    assert f"ensemble.json of {NAME} lists member_01" in said and "upload the whole ensemble folder" in said


@pytest.mark.parametrize("outside", ["../../../../elsewhere", "/etc", "member_00/../../.."])
def test_a_manifest_that_points_out_of_its_repository(folder, cache, tmp_path, outside):
    hostile = Path(shutil.copytree(folder, tmp_path / "hostile"))
    said = Manifest.read(hostile)
    said.members[1].folder = outside
    said.write(hostile)
    into_cache(hostile, cache, NAME)
    for file in ADAPTER:
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        shutil.copy(folder / "member_00" / file, tmp_path / "elsewhere")
    message = refused(NAME)
    assert f"lists {outside}" in message or "lies outside" in message


def test_a_hostile_adapter_of_a_member_is_refused_before_peft_sees_it(folder, cache, tmp_path, edit_json):
    hostile = Path(shutil.copytree(folder, tmp_path / "hostile"))
    edit_json(
        hostile / "member_02" / ADAPTER[0], auto_mapping={"base_model_class": "os", "parent_library": "os"}
    )
    into_cache(hostile, cache, NAME)
    assert "auto_mapping" in refused(NAME)


@pytest.mark.parametrize(
    "name", ["./org/name", "org/name/more", "no-organisation", "org/na me", "org/name@", "~/x/y"]
)
def test_what_is_no_hub_id_is_never_asked_for(cache, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    assert "check the path" in refused(name)


# ------------------------------------------------------------------------------------------ over the network


def run_against(address: str, home: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that takes a server of this machine for the Hub, with an empty cache."""
    home.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True, check=False
    )


FIND = """
from lm_eval_lora_ensemble.ensemble.members import find_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError
try: print(find_ensemble({name!r}, epoch={epoch}).fingerprint)
except EnsembleError as error: print(error)
"""


def adapters(kept: str = "") -> set[str]:
    return {f"member_{i:02d}{kept}/{file}" for i in range(3) for file in ADAPTER}


def test_no_more_is_downloaded_than_is_read(folder, tmp_path):
    with serve(folder, NAME) as (address, downloaded):
        done = run_against(address, tmp_path / "final", FIND.format(name=NAME, epoch=None))
        assert done.stdout.strip() == find_ensemble(folder).fingerprint, done.stderr
        assert set(downloaded) == {FILE_NAME, *adapters()} and len(downloaded) == 7
        downloaded.clear()
        done = run_against(address, tmp_path / "epoch", FIND.format(name=f"{NAME}@v1", epoch=1))
        assert done.stdout.strip() == find_ensemble(folder, epoch=1).fingerprint, done.stderr
        assert set(downloaded) == {FILE_NAME, *adapters(), *adapters("/epoch_01")}
        downloaded.clear()
        check = f"from lm_eval_lora_ensemble.cli import main; main(['check', {NAME!r}])"
        done = run_against(address, tmp_path / "check", check)
        assert "3 members on" in done.stdout, done.stdout + done.stderr
        cards = {f"member_{i:02d}/README.md" for i in range(3)}
        assert set(downloaded) == {
            FILE_NAME,
            *adapters(),
            *adapters("/epoch_01"),
            *adapters("/epoch_02"),
            *cards,
        }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/nothing", "check the name; if the repository is private, log in"),
        (f"{NAME}@nowhere", "it has no such branch, tag or commit"),
    ],
)
def test_what_the_hub_does_not_have(folder, tmp_path, name, said):
    with serve(folder, NAME) as (address, _):
        done = run_against(address, tmp_path / "home", FIND.format(name=name, epoch=None))
    assert said in done.stdout and done.stdout.count("\n") == 1, done.stdout + done.stderr


def test_a_hub_that_cannot_be_reached(tmp_path):
    done = run_against("http://127.0.0.1:9", tmp_path / "home", FIND.format(name=NAME, epoch=None))
    assert "the Hub cannot be reached: check the network" in done.stdout, done.stdout + done.stderr


def test_find_sources_says_what_the_manifest_says(folder, cache):
    into_cache(folder, cache, NAME)
    sources, listed = find_sources(NAME)
    assert listed is not None and listed.method is not None
    assert [source.entry.seed for source in sources if source.entry] == [40, 41, 42]
