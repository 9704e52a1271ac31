"""Folders that release 0.1.0 wrote: a finished one is as good as ours, an unfinished one stays 0.1.0's."""

import json
import shutil
from pathlib import Path

import pytest
from train_fixtures import make_recipe, one_thread, quick_tasks  # noqa: F401

from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.disk import sha256
from lm_eval_lora_ensemble.errors import EnsembleError, one_line
from lm_eval_lora_ensemble.train.folder import STEP_VERSION
from lm_eval_lora_ensemble.train.recipe import Recipe
from lm_eval_lora_ensemble.train.run import complete, train_members

OLD = Path(__file__).parent / "data" / "release_0_1_0"


@pytest.fixture
def copied(tmp_path):
    """Copy a folder of 0.1.0 and load its recipe for where it is now."""

    def copy(name: str) -> tuple[Path, Recipe]:
        folder = Path(shutil.copytree(OLD / name, tmp_path / name))
        return folder, Recipe.load(folder / "recipe.yaml", [f"output={folder}"])

    return copy


def contents(folder: Path) -> dict[Path, str]:
    return {path: sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def without_manifest(folder: Path, *unfinished: str) -> None:
    """What 0.1.0 left when it was killed before the last member's end."""
    (folder / "ensemble.json").unlink()
    for name in unfinished:
        (folder / name / "member.json").unlink()


def test_a_run_begun_by_0_1_0_is_refused_in_one_line_and_left_as_it_is(copied):
    folder, recipe = copied("unfinished")
    before = contents(folder)
    for go_on in (train_members, complete):
        with pytest.raises(EnsembleError, match=r"was begun by release 0\.1\.0.* another output=") as caught:
            go_on(recipe)
        assert one_line(caught.value) == str(caught.value)
    assert contents(folder) == before


def test_its_checkpoints_are_refused_without_its_recipe_too(copied):
    folder, recipe = copied("unfinished")
    (folder / "recipe.yaml").unlink()
    with pytest.raises(EnsembleError, match=r"was begun by release 0\.1\.0"):
        train_members(recipe)


def test_one_member_finished_by_0_1_0_gets_no_companion_of_this_release(copied):
    folder, recipe = copied("ensemble")
    without_manifest(folder, "member_01")
    with pytest.raises(EnsembleError, match=r"was begun by release 0\.1\.0"):
        train_members(recipe)


def test_members_all_finished_by_0_1_0_are_completed(copied):
    folder, recipe = copied("ensemble")
    was = json.loads((folder / "ensemble.json").read_text())
    without_manifest(folder)
    complete(recipe)
    now = json.loads((folder / "ensemble.json").read_text())
    assert now["members"] == was["members"] and was["recipe"].items() <= now["recipe"].items()
    assert set(was["versions"]) <= set(now["versions"])
    assert (was["schema_version"], now["schema_version"]) == (1, 3)
    assert now["calibration"] is None  # 0.1.0 did not keep the validation documents' golds


def test_a_finished_folder_of_0_1_0_is_complete_and_sound(copied, capsys):
    folder, recipe = copied("ensemble")
    before = contents(folder)
    assert train_members(recipe) == folder
    assert main(["check", str(folder)]) == 0
    assert "2 members on " in capsys.readouterr().out
    assert contents(folder) == before


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_recipe(folder)
    return folder


def test_a_run_of_this_release_says_so_before_its_recipe_and_goes_on(place, tmp_path, monkeypatch):
    from lm_eval_lora_ensemble.train.folder import EnsembleFolder

    recipe = make_recipe(place, output=str(tmp_path / "e"), max_steps=2, checkpoint_steps=1)
    marker = tmp_path / "e" / ".training" / "schema_version"
    begin, said = EnsembleFolder.begin, []
    monkeypatch.setattr(EnsembleFolder, "begin", lambda self: (said.append(marker.read_text()), begin(self)))
    train_members(recipe, member=0)
    assert said == [f"{STEP_VERSION}\n"] and marker.is_file()
    marker.write_text("99\n")
    with pytest.raises(EnsembleError, match="was begun by another release"):
        train_members(recipe)
    marker.write_text(f"{STEP_VERSION}\n")
    assert (train_members(recipe) / "ensemble.json").is_file()
    assert not marker.exists()


def test_a_recipe_may_lie_in_its_own_empty_output(place, tmp_path):
    recipe = make_recipe(place, output=str(tmp_path), max_steps=1)
    (tmp_path / "recipe.yaml").write_text(recipe.as_yaml())
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert (tmp_path / "ensemble.json").is_file()
