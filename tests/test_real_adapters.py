"""Features of adapters as they lie on public hubs: accepted where they are plain LoRA, and scored as ``hf`` scores.

Every file here is saved by PEFT and then given the feature; nobody's file is copied.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import random_adapters, tiny_tokenizer
from hostile_adapters import config, without
from test_model import PAIRS, hf, instances, lora

from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.ensemble.adapters.config import read_config
from lm_eval_lora_ensemble.ensemble.members import find_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError

CONFIG = "adapter_config.json"


@pytest.fixture
def folder(ensemble: Path, tmp_path: Path) -> Path:
    """Two members, as folders that a test may change."""
    for name in ("member_00", "member_01"):
        shutil.copytree(ensemble / name, tmp_path / "ensemble" / name)
    return tmp_path / "ensemble"


def scores(adapters: Path, **kwargs: object) -> np.ndarray:
    """Return members' loglikelihoods, [requests, N]."""
    found = lora(adapters, **kwargs).loglikelihood(instances(PAIRS), disable_tqdm=True)
    return np.array([value.members for value, _ in found])


def scores_of_hf(base: Path, adapters: Path) -> np.ndarray:
    columns = []
    for member in sorted(adapters.iterdir()):
        found = hf(base, member).loglikelihood(instances(PAIRS), disable_tqdm=True)
        columns.append([value for value, _ in found])
    return np.array(columns).T


CLASS = {
    "base_model_class": "LlamaForCausalLM",
    "parent_library": "transformers.models.llama.modeling_llama",
}
FEATURES: dict[str, dict[str, object]] = {
    "unsloth's flag": {"task_type": None, "auto_mapping": {**CLASS, "unsloth_fixed": True}},
    "further flags": {"auto_mapping": {**CLASS, "unsloth_fixed": True, "other": None, "third": False}},
    "a flag alone": {"auto_mapping": {"unsloth_fixed": True}},
    "unsloth's revision": {"revision": "unsloth"},
    "dropout is a whole number": {"lora_dropout": 0},
    "nothing excluded": {"exclude_modules": []},
    "excluded by pattern": {"exclude_modules": r".*\.o_proj"},
    "targeted by pattern": {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
    "block-diagonal nowhere": {
        "use_bdlora": {
            "target_modules_bd_a": None,
            "target_modules_bd_b": [],
            "nblocks": 4,
            "match_strict": False,
        }
    },
    "fan_in_fan_out on linear layers": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_of_real_files_changes_no_score(llama, ensemble, folder, feature, capsys):
    for member in folder.iterdir():
        config(**FEATURES[feature])(member)
    assert main(["check", str(folder)]) == 0
    found = scores(folder)
    np.testing.assert_allclose(found, scores_of_hf(llama, folder), atol=1e-4)
    np.testing.assert_array_equal(found, scores(ensemble, members=2))


def test_line_ends_of_windows(folder):
    for member in folder.iterdir():
        path = member / CONFIG
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        assert b"\r\n" in path.read_bytes()
    assert len(find_ensemble(folder).members) == 2


@pytest.mark.parametrize("base", ["/home/Jörg Müller/模型/tiny-llama", r"C:\Users\Jörg Müller\tiny-llama"])
def test_base_paths_with_spaces_and_other_scripts(llama, folder, base):
    for member in folder.iterdir():
        config(base_model_name_or_path=base)(member)
    assert find_ensemble(folder).base_model == base
    np.testing.assert_array_equal(
        scores(folder, pretrained=str(llama)), scores(folder, pretrained=str(llama))
    )


@pytest.mark.parametrize(
    ("named", "pretrained"),
    [
        ("/root/.cache/modelscope/hub/Qwen/Qwen2___5-0___5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        (
            "/home/x/hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db649",
            "Qwen/Qwen2.5-0.5B",
        ),
        (r"D:\models\Qwen2.5-0.5B" + "\\", "./Qwen2.5-0.5B/"),
    ],
)
def test_a_cache_of_a_hub_names_the_same_base(folder, named, pretrained):
    for member in folder.iterdir():
        config(base_model_name_or_path=named)(member)
    assert find_ensemble(folder, pretrained=pretrained).base_model == pretrained
    with pytest.raises(EnsembleError, match="were trained on"):
        find_ensemble(folder, pretrained=pretrained.replace("0.5B", "1.5B"))


def test_unsloths_revision_is_no_revision_of_the_base(folder):
    """Unsloth marks its adapters with it; the base model's repository has no such branch."""
    config(revision="unsloth")(folder / "member_00")
    assert read_config(folder / "member_00" / CONFIG).revision is None
    config(revision="v1.0")(folder / "member_00")
    assert read_config(folder / "member_00" / CONFIG).revision == "v1.0"


# ------------------------------------------------------------------------------------------ a base that is not named

NAMELESS = {
    "null": config(base_model_name_or_path=None),
    "empty": config(base_model_name_or_path=""),
    "absent": without("base_model_name_or_path"),
}


@pytest.mark.parametrize("how", NAMELESS)
def test_a_base_that_is_not_named_is_pretrained(llama, ensemble, folder, how, capsys):
    for member in folder.iterdir():
        NAMELESS[how](member)
    np.testing.assert_array_equal(scores(folder, pretrained=str(llama)), scores(ensemble, members=2))
    np.testing.assert_array_equal(scores(folder, pretrained=str(llama), epoch=0), scores(ensemble, epoch=0))
    assert main(["check", str(folder), "--pretrained", str(llama)]) == 0
    assert f"2 members on {llama}" in capsys.readouterr().out


@pytest.mark.parametrize("nameless", [["member_00", "member_01"], ["member_00"], ["member_01"]])
@pytest.mark.parametrize("epoch", [None, 0])
def test_without_pretrained_it_is_asked_for(folder, nameless, epoch, capsys):
    for name in nameless:
        config(base_model_name_or_path=None)(folder / name)
    for load in (find_ensemble, lora):
        with pytest.raises(
            EnsembleError, match=rf"{nameless[0]}/{CONFIG} names no base model; give pretrained="
        ):
            load(folder, epoch=epoch)
    assert main(["check", str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out.count(": ok") == 2 and "names no base model; give pretrained=" in captured.err


def test_one_that_is_named_still_has_to_be_pretrained(folder):
    config(base_model_name_or_path=None)(folder / "member_00")
    with pytest.raises(EnsembleError, match="not on pretrained=org/other"):
        find_ensemble(folder, pretrained="org/other")


# ------------------------------------------------------------------------------------------ fan_in_fan_out


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2: its attention and feed-forward layers are ``Conv1D``, its head is linear."""
    folder = tmp_path_factory.mktemp("base") / "tiny-gpt2"
    torch.manual_seed(7)
    settings = transformers.GPT2Config(
        vocab_size=600,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("said", [True, False, None])
def test_the_layer_decides_about_fan_in_fan_out_not_the_file(gpt2, tmp_path, said, use_dora):
    """Real files say false of Conv1D; PEFT goes by the layer, and so do we, one member after the other."""
    targets = ["c_attn", "c_proj", "lm_head"]
    adapters = random_adapters(
        gpt2, tmp_path / "ensemble", 2, spread=0.1, target_modules=targets, use_dora=use_dora
    )
    right = scores(adapters)
    # members that say different things share the layers that PEFT makes for the first
    for member, value in zip(sorted(adapters.iterdir()), (said, not said), strict=True):
        config(fan_in_fan_out=value)(member)
    found = scores(adapters)
    np.testing.assert_array_equal(found, right)
    np.testing.assert_allclose(found, scores_of_hf(gpt2, adapters), atol=1e-4)
    assert np.ptp(found, axis=1).max() > 0.01


def test_matrices_the_wrong_way_round_are_refused_whatever_the_file_says(gpt2, tmp_path):
    adapters = random_adapters(gpt2, tmp_path / "ensemble", 1, target_modules=["c_attn"])
    path = adapters / "member_00" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    turned = {}
    for name, tensor in load_file(path).items():
        other = name.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B")
        turned[other] = tensor.T.contiguous()
    save_file(turned, path)
    config(fan_in_fan_out=True)(adapters / "member_00")
    with pytest.raises(EnsembleError, match=r"A of .*c_attn has shape \(4, 144\).* needs \(4, 48\)"):
        lora(adapters)


# ------------------------------------------------------------------------------------------ other libraries' folders


def test_an_mlx_folder_is_named_although_peft_finds_no_weights_in_it(folder):
    """MLX-LM calls its weights adapters.safetensors: the configuration says what the folder is."""
    member = folder / "member_00"
    (member / "adapter_model.safetensors").rename(member / "adapters.safetensors")
    (member / CONFIG).write_text(json.dumps({"fine_tune_type": "dora", "num_layers": 8, "seed": 0}))
    with pytest.raises(EnsembleError, match="is MLX-LM's, another format than PEFT's"):
        find_ensemble(folder)


def test_an_adapterhub_folder_is_named(folder):
    member = folder / "member_00"
    (member / "adapter_model.safetensors").rename(member / "pytorch_adapter.bin")
    values = {"config": {"r": 8}, "model_type": "llama", "model_class": "LlamaAdapterModel", "name": "x"}
    (member / CONFIG).write_text(json.dumps(values))
    with pytest.raises(EnsembleError, match="is AdapterHub's"):
        find_ensemble(folder)
