"""Finding members: what is accepted, and the one line each mistake gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lm_eval_lora_ensemble.ensemble.manifest import Manifest, MemberEntry
from lm_eval_lora_ensemble.ensemble.members import find_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError


@pytest.fixture
def folder(ensemble: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ensemble, tmp_path / "ensemble"))


def with_manifest(folder: Path, llama: Path) -> Path:
    """Give the folder an ensemble.json with one kept epoch a member."""
    entries = []
    for i in range(3):
        name = f"member_{i:02d}"
        shutil.copytree(folder / name, folder / name / "epoch_01")
        entries.append(MemberEntry(name, name, seed=40 + i, epochs={1: f"{name}/epoch_01"}))
    Manifest(str(llama), None, entries).write(folder)
    return folder


def test_a_folder_of_adapters_one_adapter_and_lists(folder, llama):
    every = find_ensemble(folder)
    assert [member.name for member in every.members] == ["member_00", "member_01", "member_02"]
    assert every.base_model == str(llama)
    one = find_ensemble(folder / "member_01")
    assert one.members[0].sha256 == every.members[1].sha256
    listed = find_ensemble([folder / "member_02", folder / "member_00"])
    assert [m.sha256 for m in listed.members] == [every.members[i].sha256 for i in (2, 0)]
    joined = find_ensemble(f"{folder / 'member_02'};{folder / 'member_00'}")
    assert joined.fingerprint == listed.fingerprint != every.fingerprint


def test_a_manifest_gives_seeds_and_epochs(folder, llama):
    with_manifest(folder, llama)
    assert [member.seed for member in find_ensemble(folder).members] == [40, 41, 42]
    first = find_ensemble(folder, epoch=1)
    assert [m.folder.name for m in first.members] == ["epoch_01"] * 3
    assert first.fingerprint != find_ensemble(folder).fingerprint
    assert find_ensemble(folder, epoch=0).members == ()


def test_epochs_are_found_without_a_manifest(folder):
    for i in range(3):
        shutil.copytree(folder / f"member_{i:02d}", folder / f"member_{i:02d}" / "epoch_02")
    assert find_ensemble(folder, epoch=2).epoch == 2


def test_the_default_is_the_folder_training_writes(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert len(find_ensemble().members) == 3


def test_a_mirror_of_the_base_is_the_same_base(folder, llama, tmp_path):
    mirror = tmp_path / "mirror" / llama.name
    assert find_ensemble(folder, pretrained=str(mirror)).base_model == str(mirror)


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda f: None, {"adapters": "./nowhere"}, "no adapter folder './nowhere'"),
        (lambda f: None, {"adapters": []}, "empty list"),
        (lambda f: None, {"members": 4}, r"members=4.*has 3 members.*1 to 3"),
        (lambda f: None, {"epoch": 7}, r"no epoch 7; kept epochs: none"),
        (lambda f: None, {"pretrained": "mistralai/Mistral-7B-v0.1"}, "not on pretrained=mistralai"),
        (lambda f: [shutil.rmtree(p) for p in f.iterdir()], {}, "no adapters in"),
        (lambda f: (f / "member_01" / "adapter_config.json").unlink(), {}, "smaller ensemble"),
        (
            lambda f: (f / "member_01" / "adapter_model.safetensors").unlink(),
            {},
            "has no adapter_model.safetensors",
        ),
        (lambda f: (f / "member_01" / "adapter_config.json").write_text("{"), {}, "not readable JSON"),
        (lambda f: (f / "member_01" / "adapter_config.json").write_text("[]"), {}, "holds no JSON object"),
        (lambda f: (f / "ensemble.json").write_text(""), {}, "not a readable manifest"),
        (lambda f: (f / "ensemble.json").write_text('{"schema_version": 99}'), {}, "schema version 99"),
        (lambda f: (f / "ensemble.json").write_text('{"schema_version": 1, "members": 3}'), {}, "manifest"),
    ],
)
def test_each_mistake_is_named(folder, spoil, arguments, message):
    spoil(folder)
    with pytest.raises(EnsembleError, match=message):
        find_ensemble(**{"adapters": folder, **arguments})


@pytest.mark.parametrize("target", ["/nowhere/member_03", "member_03"])
def test_a_link_to_what_is_not_there_is_no_smaller_ensemble(folder, target):
    (folder / "member_03").symlink_to(target)
    with pytest.raises(EnsembleError, match="a missing member would silently make a smaller ensemble"):
        find_ensemble(folder)
    (folder / "member_03").unlink()
    (folder / "note").symlink_to(folder / "member_00" / "adapter_config.json")  # a file is no member
    assert len(find_ensemble(folder).members) == 3


def test_adapters_of_different_bases(folder, edit_json):
    edit_json(folder / "member_02" / "adapter_config.json", base_model_name_or_path="other/base")
    with pytest.raises(EnsembleError, match=r"different base models.*member_02 is on other/base"):
        find_ensemble(folder)


def test_a_manifest_cannot_point_outside_its_folder(folder, llama):
    Manifest(str(llama), None, [MemberEntry("member_00", "../elsewhere")]).write(folder)
    with pytest.raises(EnsembleError, match="lies outside"):
        find_ensemble(folder)


def test_nothing_given_and_nothing_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnsembleError, match=r"no adapters given and no ./ensemble here.*lora-ensemble train"):
        find_ensemble()


def test_messages_are_one_printable_line(folder):
    from lm_eval_lora_ensemble.errors import one_line

    (folder / "member_01" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "a\x1b[31m\nb"})
    )
    with pytest.raises(EnsembleError) as caught:
        find_ensemble(folder)
    assert "\x1b" not in one_line(caught.value) and "\n" not in one_line(caught.value)
