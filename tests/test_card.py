"""The cards: what the Hub reads of them, what a reader does, and whose results they show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from card_fixtures import RESAMPLES, card, contents, edit_results, make_place, refused, synthetic, text
from hub_server import into_cache
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from report_fixtures import write_run

from lm_eval_lora_ensemble import evaluate, load_runs
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.card.subject import base_arguments, hub_name
from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME, Manifest, Method, Provenance
from lm_eval_lora_ensemble.ensemble.members import find_ensemble
from lm_eval_lora_ensemble.metrics.answers import ANSWER_SCORES
from lm_eval_lora_ensemble.metrics.strings import quantities


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------- what the Hub reads


def test_the_hubs_own_classes_read_what_the_analysis_computed(place):
    assert card("--base-model", "org/base", "--license", "apache-2.0", "--repository", "me/tiny") == 0
    read = ModelCard.load(Path("ensemble/README.md"))
    assert isinstance(read.data, ModelCardData) and read.data.model_name == "tiny"
    (run,) = load_runs("results")
    expected = evaluate(run, settings=Settings(resamples=RESAMPLES)).tasks
    found = {(one.dataset_args["task"], one.metric_type): one for one in read.data.eval_results}
    assert {task for task, _ in found} == set(run.top_level())
    compared = 0
    for (task, metric), one in found.items():
        of = expected[task].metrics["accuracy" if metric == "acc" else metric]
        low, high, kind = of.ensemble.quoted
        assert one.metric_value == pytest.approx(of.ensemble.value, abs=1e-6)
        assert one.dataset_args["documents"] == expected[task].documents
        if np.isfinite(low):
            assert (one.metric_args["low"], one.metric_args["high"]) == pytest.approx((low, high), abs=1e-6)
            assert one.metric_args["interval"] == kind
        assert one.metric_args["mean_member"] == pytest.approx(of.member_mean.value, abs=1e-6)
        assert one.metric_args["difference"] == pytest.approx(of.difference.value, abs=1e-6)
        assert (one.metric_args["level"], one.metric_args["members"]) == (0.95, 2)
        compared += 1
    assert compared == len(read.data.eval_results) >= 16
    assert {"accuracy", "nll", "brier_score", "ece"} <= {metric for _, metric in found}


def test_the_index_goes_round_and_is_strict_json(place):
    assert card() == 0
    metadata = yaml.safe_load(text().split("---\n")[1])
    index = metadata["model-index"]
    json.dumps(index, allow_nan=False)
    name, results = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, results) == index
    assert all(isinstance(one, EvalResult) and one.metric_value is not None for one in results)


def test_metadata_of_the_ensemble_and_of_its_members(place):
    assert (
        card("--base-model", "org/base", "--dataset", "org/data", "--license", "mit", "--name", "Tiny one")
        == 0
    )
    data = ModelCard.load(Path("ensemble/README.md")).data.to_dict()
    expected = {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "datasets": ["org/data"],
    }
    assert expected.items() <= data.items()
    assert {"lora", "ensemble", "uncertainty", "base_model:adapter:org/base"} <= set(data["tags"])
    assert data["model-index"][0]["name"] == "Tiny one"
    for i in range(2):
        member = ModelCard.load(Path(f"ensemble/member_{i:02d}/README.md"))
        assert (
            expected.items() <= member.data.to_dict().items() and "model-index" not in member.data.to_dict()
        )
        assert f"member {i + 1} of 2" in member.text and "](../README.md)" in member.text


def test_without_a_base_on_the_hub_the_user_is_told(place, capsys):
    assert card() == 0
    assert "give --base-model ORGANISATION/NAME" in capsys.readouterr().out
    assert "base_model" not in ModelCard.load(Path("ensemble/README.md")).data.to_dict()
    assert "/models/" not in text(), "a place on somebody's machine"


def test_a_datasets_name_split_and_shots_come_from_lm_evals_configuration(place):
    def edit(said: dict) -> None:
        for config in said["configs"].values():
            config.update(dataset_path="org/words", dataset_name="en", test_split="test", num_fewshot=5)

    edit_results(Path("results"), edit)
    manifest = Manifest.read(Path("ensemble"))
    manifest.recipe["task"] = ["plain_a"]
    manifest.write(Path("ensemble"))
    assert card() == 0
    data = ModelCard.load(Path("ensemble/README.md")).data
    assert data.datasets == ["org/words"]
    assert {(one.dataset_type, one.dataset_config, one.dataset_split) for one in data.eval_results} == {
        ("org/words", "en", "test")
    }
    assert {one.dataset_args["num_few_shot"] for one in data.eval_results} == {5}
    assert "**both (5-shot)**, 30 documents, 2 tasks pooled" in text()
    # the Hub's format joins what is on the same data: the metrics' names still tell the tasks apart
    names = [(one.metric_type, one.metric_name) for one in data.eval_results]
    assert len(set(names)) == len(names) and ("accuracy", "acc, both (5-shot)") in names


def test_no_place_on_this_machine_is_taken_for_a_dataset(place):
    (place / "org" / "words").mkdir(parents=True)
    edit_results(
        Path("results"), lambda s: [c.update(dataset_path="org/words") for c in s["configs"].values()]
    )
    assert card() == 0
    types = {one.dataset_type for one in ModelCard.load(Path("ensemble/README.md")).data.eval_results}
    assert types == {"both", "varies_context"}


# -------------------------------------------------------------------------------------------- the text


def test_the_text_says_what_a_reader_needs(place):
    assert card("--repository", "me/tiny", "--base-model", "org/base") == 0
    said = text()
    assert (
        "2 LoRA adapters on [org/base](https://huggingface.co/org/base), trained from different seeds."
        in said
    )
    command = re.search(r"lm_eval run --model lora-ensemble --model_args (\S+) --tasks (\S+) ", said)
    assert command and command[1] == "pretrained=org/base,adapters=me/tiny"
    assert command[2] in load_runs("results")[0]
    for heading in (
        "Use",
        "Results",
        "What the numbers are about",
        "Members",
        "How the members were made",
        "Limits",
    ):
        assert f"\n## {heading}\n" in said
    assert "summed, T = 1" in said and "95% bootstrap intervals over documents" in said
    assert "| learning_rate | 0.005 |" in said and "[member_01](member_01) | seed 1 |" in said
    row = next(line for line in said.splitlines() if line.startswith("| nll ↓ |"))
    assert len(re.findall(r"\[−?\d+\.\d{3}, −?\d+\.\d{3}\]", row)) == 3


def test_another_scale_is_said(place):
    found = find_ensemble("ensemble")
    quiz = synthetic(Path("quiz"), "base", [member.sha256 for member in found.members], {"quiz": 120})
    assert card("--temperature", "crossfit", results=[quiz]) == 0
    assert "summed, T cross-fitted" in text() and "an oracle" in text()
    assert "No temperature was fitted" not in text()


def test_members_that_were_drawn(place):
    manifest = Manifest.read(Path("ensemble"))
    manifest.method = Method("swag", {"scale": 0.5}, {"K": 5, "task": "/home/me/task"}, seed=7)
    for i, entry in enumerate(manifest.members):
        entry.seed, entry.draw = None, i
        entry.provenance = Provenance("member_00", "/home/me/trained", "ab" * 32)
    manifest.write(Path("ensemble"))
    assert card() == 0
    assert "drawn by swag (scale 0.5)" in text() and "Drawn by `swag`, seed 7." in text()
    assert "| K | 5 |" in text() and "draw 1 of member_00 (sha256 abababababab)" in text()
    assert "/home/me" not in text() + text(Path("ensemble/member_00"))


def add_samples(task: str, lines: list[dict]) -> None:
    (file,) = Path("results").rglob("results_*.json")
    rows = "".join(json.dumps(line) + "\n" for line in lines)
    (file.parent / f"samples_{task}_{file.stem.removeprefix('results_')}.jsonl").write_text(rows)


def entries_of(task: str) -> dict[str, EvalResult]:
    entries = ModelCard.load(Path("ensemble/README.md")).data.eval_results
    return {one.metric_name: one for one in entries if one.dataset_args["task"] == task}


def test_whole_strings(place):
    draw = np.random.default_rng(0)
    members, tokens = -draw.uniform(5, 20, size=(2, 12)), draw.integers(3, 9, size=12)
    found = quantities(members)
    add_samples(
        "stories",
        [
            {
                "doc_id": d,
                "members": members[:, d].tolist(),
                "nll_per_token": [found["nll"][d], int(tokens[d])],
            }
            for d in range(12)
        ],
    )
    assert card() == 0
    values = entries_of("stories")
    assert set(values) == {"nll_per_token", "member_nll_per_token", "reverse_mutual_information"}
    one = values["nll_per_token"]
    assert one.metric_value == pytest.approx(found["nll"].sum() / tokens.sum(), abs=1e-6)
    assert one.metric_args["low"] < one.metric_value < one.metric_args["high"]
    assert "12 whole strings" in text() and "| nll_per_token ↓ |" in text()


def test_generated_answers_under_each_filter(place):
    draw = np.random.default_rng(1)
    add_samples(
        "sums",
        [
            {
                "doc_id": d,
                "filter": key,
                "metrics": ["exact_match"],
                "exact_match": float((d + shift) % 3 > 0),
                "generation": [
                    {
                        "tokens": 3,
                        "members": [-1.0, -1.2],
                        **dict.fromkeys(ANSWER_SCORES, float(draw.uniform())),
                    }
                ],
            }
            for key, shift in (("strict", 0), ("flexible", 1))
            for d in range(20)
        ],
    )
    assert card() == 0
    values = entries_of("sums")
    assert {name for name in values if "exact_match" in name} == {
        "exact_match, strict",
        "exact_match, flexible",
    }
    assert values["exact_match, strict"].metric_value == pytest.approx(13 / 20)
    assert values["exact_match, strict"].metric_args["filter"] == "strict"
    assert "**sums, strict**, 20 generated answers" in text() and "AUROC of answer_nll" in text()


# ------------------------------------------------------------------------------------------ whose results


def test_results_of_another_ensemble(place, capsys):
    edit_results(
        Path("results"), lambda s: s["config"]["lora_ensemble"]["members"][0].update(sha256="0" * 64)
    )
    said = refused(capsys)
    assert (
        "has results of another ensemble (adapters=" in said and "2 members, fingerprint 359be7452dc0" in said
    )


def test_results_on_another_base(place, capsys):
    edit_results(Path("results"), lambda s: s["config"]["lora_ensemble"].update(base_model="org/other"))
    assert "on the base model org/other, and the ensemble is on" in refused(capsys)


def test_results_of_no_ensemble(place, capsys):
    config = {"model": "hf", "model_args": {"pretrained": "base"}}
    other = write_run(Path("hf"), {"quiz": 20}, members=1, config=config)
    assert "does not say which adapters it scored (model hf)" in refused(capsys, results=["results", other])


def test_results_of_some_members_of_an_epoch_and_of_the_base_are_left_out(place, capsys):
    base, members = "base", [member.sha256 for member in find_ensemble("ensemble").members]
    kept = [member.sha256 for member in find_ensemble("ensemble", epoch=1).members]
    assert not set(kept) & set(members)
    runs = {
        "some": synthetic(Path("more/some"), base, members[:1]),
        "kept": synthetic(Path("more/kept"), base, kept),
        "prior": synthetic(Path("more/prior"), base, []),
    }
    assert card(results=["results", *runs.values()]) == 0
    said = capsys.readouterr().out
    assert "1 of the ensemble's 2 members" in said and "epoch 1, not the members' final adapters" in said
    assert "the base model alone, epoch 0" in said and "quiz" not in text()
    assert "no results of the ensemble's 2 final members" in refused(capsys, results=[runs["kept"]])


def test_the_last_epoch_is_the_final_adapters(place, capsys):
    """A sweep's last epoch scored the very adapters of the card, whatever it calls them."""
    assert [m.sha256 for m in find_ensemble("ensemble", epoch=2).members] == [
        m.sha256 for m in find_ensemble("ensemble").members
    ]
    edit_results(Path("results"), lambda s: s["config"]["lora_ensemble"].update(epoch=2))
    assert card() == 0


def test_tasks_of_several_runs_join_and_none_may_be_there_twice(place, capsys):
    base, members = "base", [member.sha256 for member in find_ensemble("ensemble").members]
    more = synthetic(Path("more"), base, members)
    assert card(results=["results", more]) == 0
    assert "**quiz**, 40 documents" in text() and "**both (0-shot)**, 30 documents" in text()
    again = synthetic(Path("again"), base, members, date="2026-02-03T03-04-05.678901")
    said = refused(capsys, results=[more, again])
    assert "quiz was evaluated twice" in said and "2026-02-03" in said and "name the results_*.json" in said
    assert card(results=[more, more]) == 0  # one run named twice is one run


# -------------------------------------------------------------------------------------------- by Hub id


def test_the_card_of_an_ensemble_on_the_hub(place, capsys, monkeypatch):
    cache = place / "cache"
    into_cache(Path("ensemble"), cache, "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    before = contents(cache)
    arguments = ["card", "org/tiny", "results", "--resamples", str(RESAMPLES)]
    assert main(arguments) == 2
    assert "is in the Hub's cache, where nothing is written" in capsys.readouterr().err
    assert main([*arguments, "--output", "cards"]) == 0 and contents(cache) == before
    assert sorted(contents(Path("cards"))) == [
        *("README.md", FILE_NAME, "member_00/README.md", "member_01/README.md")
    ]
    assert "adapters=org/tiny" in text(Path("cards"))
    assert "hf upload org/tiny cards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repository", "no-organisation"], "--repository no-organisation: give a Hub id"),
        (["--base-model", "/models/base"], "--base-model /models/base: give a Hub id"),
        (["--dataset", "mine"], "--dataset mine: give a Hub id"),
    ],
)
def test_what_is_no_hub_id(place, capsys, arguments, said):
    assert said in refused(capsys, *arguments)


def test_names_of_a_base():
    assert hub_name("/x/hub/models--org--model-1/snapshots/abc") == "org/model-1"
    assert hub_name("C:\\hub\\models--org--model\\snapshots\\abc") == "org/model"
    assert hub_name("gpt2") is None and hub_name("/models/gpt2") is None
    assert base_arguments("/x/model", None) == "pretrained=BASE,"
