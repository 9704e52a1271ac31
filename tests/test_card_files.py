"""The files of cards: the folder stays sound around them, and no person's README.md is replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from card_fixtures import RELEASE, card, contents, make_place, refused, synthetic, text

from lm_eval_lora_ensemble import disk
from lm_eval_lora_ensemble.card import readme
from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.ensemble.manifest import Manifest
from lm_eval_lora_ensemble.ensemble.members import find_ensemble


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------- the folder stays sound


def test_check_stays_true_and_the_second_card_is_the_first(place, capsys):
    before = Manifest.read(Path("ensemble"))
    assert any(name.endswith("README.md") for entry in before.members for name in entry.files)
    assert card() == 0 and main(["check", "ensemble"]) == 0
    after = contents(Path("ensemble"))
    assert card() == 0 and contents(Path("ensemble")) == after
    now = Manifest.read(Path("ensemble"))
    for old, new in zip(before.members, now.members, strict=True):
        gone = old.files.keys() - new.files.keys()
        assert gone == {f"{old.folder}/README.md"}
        entry = json.loads(Path("ensemble", new.folder, "member.json").read_text())
        assert entry["files"] == new.files
    assert (now.recipe, now.calibration, now.versions) == (before.recipe, before.calibration, before.versions)
    assert find_ensemble("ensemble").fingerprint == find_ensemble(RELEASE / "ensemble").fingerprint


@pytest.mark.parametrize("after", range(6))
def test_a_kill_between_two_files_leaves_a_sound_folder(place, monkeypatch, after):
    """Stopped before each file that is written: `check` holds, and the same command writes the rest."""
    writes = 0
    write = disk.write_text

    def stopping(path: Path, content: str) -> None:
        nonlocal writes
        if writes == after:
            raise KeyboardInterrupt
        writes += 1
        write(path, content)

    for module in (disk, readme):
        monkeypatch.setattr(module, "write_text", stopping)
    assert card() == 130
    assert main(["check", "ensemble"]) == 0
    for module in (disk, readme):
        monkeypatch.setattr(module, "write_text", write)
    assert card() == 0 and main(["check", "ensemble"]) == 0
    assert all(readme.is_sealed(text(Path("ensemble", name))) for name in (".", "member_00", "member_01"))
    for name in ("member_00", "member_01"):
        assert f'"{name}/README.md"' not in Path("ensemble", name, "member.json").read_text()


def test_adapters_from_elsewhere_get_a_manifest(ensemble, llama, place, capsys):
    """PEFT's own empty README.md goes; the folder can be loaded by Hub id afterwards."""
    shutil.rmtree("ensemble")
    shutil.copytree(ensemble, "ensemble")
    assert all(readme.is_stock(text(Path(f"ensemble/member_{i:02d}"))) for i in range(3))
    found = find_ensemble("ensemble")
    results = synthetic(Path("synthetic"), found.base_model, [member.sha256 for member in found.members])
    assert card(results=[results]) == 0
    assert len(Manifest.read(Path("ensemble")).members) == 3 and main(["check", "ensemble"]) == 0
    assert "3 LoRA adapters on tiny-llama. They answer" in text() and "Not known here" in text()


# ------------------------------------------------------------------------------------ a person's README.md


@pytest.mark.parametrize("where", ["", "member_01"])
def test_a_persons_text_is_never_replaced_unasked(place, capsys, where):
    path = Path("ensemble", where, "README.md")
    path.write_text("# What I found out\n")
    said = refused(capsys)
    assert str(path) in said and "--force" in said and "--output" in said
    assert card("--output", "cards") == 0 and path.read_text() == "# What I found out\n"
    assert readme.is_sealed(text(Path("cards"))) and Manifest.read(Path("cards")).members
    assert card("--force") == 0 and readme.is_sealed(path.read_text())


def test_a_card_that_a_person_changed_is_theirs(place, capsys):
    assert card() == 0
    path = Path("ensemble/README.md")
    path.write_text(path.read_text().replace("## Limits\n", "## Limits\n\n- Not for medicine.\n"))
    assert "ensemble/README.md was written or changed by somebody" in refused(capsys)


def test_line_ends_do_not_count(place):
    assert card() == 0
    path = Path("ensemble/README.md")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert card("--name", "another") == 0 and "# another" in text()


def test_what_training_wrote_goes_and_what_was_changed_since_stays(place, capsys):
    path = Path("ensemble/member_00/README.md")
    path.write_text(path.read_text() + "\nMy notes.\n")
    assert "member_00/README.md was written or changed" in refused(capsys)


@pytest.mark.parametrize(
    ("change", "stock"),
    [
        (lambda t: t, True),
        (lambda t: t.replace("\n", "\r\n"), True),
        (lambda t: t + "\nTrained on my own letters.\n", False),
        (lambda t: t.replace("[More Information Needed]", "me", 1), False),
        (lambda t: t.replace("library_name: peft", "library_name: peft\nlicense: mit"), False),
        (lambda t: t.replace("tags:\n", "tags:\n- my-tag\n"), False),
        (lambda t: t.replace("---\n", "---\n: [", 1), False),
    ],
)
def test_pefts_empty_template_is_known_by_every_line(ensemble, change, stock):
    peft = (ensemble / "member_00" / "README.md").read_text()
    assert "[More Information Needed]" in peft and "tags:\n" in peft
    assert readme.is_stock(change(peft)) is stock


def test_a_link_or_a_folder_in_its_place_is_nobodys_to_replace(place, capsys, tmp_path):
    path = Path("ensemble/README.md")
    path.mkdir()
    refused(capsys)
    path.rmdir()
    (place / "elsewhere.md").write_text("mine")
    path.symlink_to(place / "elsewhere.md")
    refused(capsys)
    assert card("--force") == 0 and (place / "elsewhere.md").read_text() == "mine" and not path.is_symlink()


# ------------------------------------------------------------------------------------ another place


def test_another_ensembles_manifest_is_never_replaced(place, capsys):
    shutil.copytree("ensemble", "other")
    manifest = Manifest.read(Path("other"))
    manifest.members.pop()
    manifest.write(Path("other"))
    assert "other has the ensemble.json of another ensemble" in refused(
        capsys, "--output", "other", "--force"
    )
    assert card("--output", "cards") == 0 and card("--output", "cards") == 0


def test_a_place_that_cannot_be_written(place, capsys):
    (place / "file").write_text("")
    assert "cannot write in file/cards: " in refused(capsys, "--output", "file/cards")
