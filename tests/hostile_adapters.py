"""Adapter folders as a hostile stranger would send them, each a really saved adapter with one thing changed.

A case changes one member of an ensemble folder (``MEMBER_CASES``) or the folder around it (``FOLDER_CASES``),
and says in which words it must be refused.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"

Spoil = Callable[[Path], object]
Case = tuple[str, Spoil, str]


# ------------------------------------------------------------------------------------------- configuration


def config(**changes: object) -> Spoil:
    def spoil(member: Path) -> None:
        path = member / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def config_text(change: Callable[[str], str | bytes]) -> Spoil:
    def spoil(member: Path) -> None:
        path = member / CONFIG
        text = change(path.read_text())
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


def without(key: str) -> Spoil:
    def spoil(member: Path) -> None:
        path = member / CONFIG
        values = json.loads(path.read_text())
        del values[key]
        path.write_text(json.dumps(values))

    return spoil


CANARY_MODULE = "canary_module"
CLASS = {"base_model_class": "Canary", "parent_library": CANARY_MODULE}
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000

LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 16777216\n"
# the keys that such files have; the values are ours
MLX = json.dumps(
    {
        "adapter_path": "adapters",
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
        "model": "org/model-4bit",
        "num_layers": 16,
    }
)
ADAPTERHUB = json.dumps(
    {
        "config": {"architecture": "lora", "r": 8, "alpha": 16},
        "hidden_size": 64,
        "model_class": "LlamaAdapterModel",
        "model_name": "org/model",
        "model_type": "llama",
        "name": "task",
        "version": "adapters.1.0.0",
    }
)

CONFIG_CASES: list[Case] = [
    ("no json", config_text(lambda text: "{"), "not readable JSON"),
    ("a list", config_text(lambda text: "[]"), "holds no JSON object"),
    ("empty", config_text(lambda text: ""), "not readable JSON"),
    ("duplicate key", config_text(lambda t: t.replace('"r": 4', '"r": 4, "r": 8')), "'r' is there twice"),
    ("deep json", config_text(lambda text: DEEP), "nested deeper than 32 levels"),
    ("deep value", config(surprise=json.loads("[" * 40 + "]" * 40)), "nested deeper than 32 levels"),
    ("huge json", config_text(lambda text: text + " " * (1 << 20)), "larger than 1,048,576 bytes"),
    ("not utf-8", config_text(lambda text: text.encode() + b"\xff"), "can't decode byte 0xff"),
    ("utf-16", config_text(lambda text: text.encode("utf-16")), "not readable JSON"),
    ("json nan", config_text(lambda text: text.replace('"r": 4', '"r": NaN')), "NaN is not a JSON number"),
    ("json infinity", config(lora_alpha=float("inf")), "Infinity is not a JSON number"),
    (
        "a number beyond floats",
        config_text(lambda t: t.replace('_alpha": 8', '_alpha": 1e999')),
        "lora_alpha=inf",
    ),
    ("prompt tuning", config(peft_type="PROMPT_TUNING"), "of type 'PROMPT_TUNING', not LORA"),
    ("x-lora", config(peft_type="XLORA"), "of type 'XLORA', not LORA"),
    ("no type", without("peft_type"), "lacks peft_type"),
    ("no base", without("base_model_name_or_path"), "names no base model; give pretrained="),
    ("base is null", config(base_model_name_or_path=None), "names no base model; give pretrained="),
    ("base is a number", config(base_model_name_or_path=7), "base_model_name_or_path=7 is refused"),
    ("classification", config(task_type="SEQ_CLS"), "task_type='SEQ_CLS'"),
    ("unknown key", config(surprise=1), "the key 'surprise' is not known"),
    ("import hook", config(auto_mapping=CLASS), "auto_mapping=.* names a class to import"),
    (
        "import hook inside transformers' own cache of remote code",
        config(auto_mapping={**CLASS, "parent_library": "transformers_modules.evil.modeling"}),
        "auto_mapping=.* names a class to import",
    ),
    (
        "import hook beside a flag",
        config(auto_mapping={**CLASS, "unsloth_fixed": True}),
        "auto_mapping=.* names a class to import",
    ),
    (
        "import hook under another key",
        config(auto_mapping={"unsloth_fixed": True, "class": f"{CANARY_MODULE}.Canary"}),
        "auto_mapping=.* names a class to import",
    ),
    ("megatron module", config(megatron_core=CANARY_MODULE), "megatron_core=.* names a module to import"),
    ("megatron settings", config(megatron_config={"a": 1}), "megatron_config=.* code to import"),
    ("auto_map", config(auto_map={"AutoModel": f"{CANARY_MODULE}.Canary"}), "auto_map=.* may name no code"),
    ("trust_remote_code", config(trust_remote_code=True), "trust_remote_code=True.* may name no code"),
    ("custom class", config(custom_class=f"{CANARY_MODULE}.Canary"), "custom_class=.* may name no code"),
    ("runtime settings", config(runtime_config={"ephemeral_gpu_offload": True}), "runtime_config="),
    ("base is a url", config(base_model_name_or_path="https://evil.example/base"), "not a remote address"),
    ("base is a share", config(base_model_name_or_path=r"\\evil\share"), "not a remote address"),
    ("base without end", config(base_model_name_or_path="x" * 3000), "base_model_name_or_path="),
    ("revision climbs", config(revision="../../../evil"), "revision=.* branch, tag or commit"),
    ("rank 10**9", config(r=10**9), "r=1000000000 is refused: a rank is"),
    ("rank 10**4000", config_text(lambda t: t.replace('"r": 4', f'"r": {10**4000}')), "a rank is"),
    ("rank 0", config(r=0), "r=0 is refused"),
    ("rank -4", config(r=-4), "r=-4 is refused"),
    ("rank true", config(r=True), "r=True is refused"),
    ("rank 4.0", config(r=4.0), "r=4.0 is refused"),
    ("rank '4'", config(r="4"), "r='4' is refused"),
    ("no rank", without("r"), "lacks r"),
    ("absurd rank pattern", config(rank_pattern={"q_proj": 10**9}), "rank_pattern="),
    ("rank pattern is a list", config(rank_pattern=["q_proj"]), "rank_pattern="),
    ("absurd alpha", config(lora_alpha=1e30), r"lora_alpha=1e\+30"),
    (
        "pattern that never ends",
        config(target_modules=r"([\w.]|[\w.][\w.]|\w)+[^\w.]"),
        "takes more than 1.0 s",
    ),
    ("pattern that is none", config(target_modules="(q_proj"), "is no regular expression"),
    ("modules are an object", config(target_modules={"q_proj": 1}), "target_modules="),
    ("biases of the base", config(bias="all"), "bias='all'.* every other member"),
    ("layers of the base", config(layer_replication=[[0, 3], [0, 3]]), "layer_replication=.* every other"),
    ("initialised from the base", config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    ("loftq", config(loftq_config={"loftq_bits": 4}), "loftq_config="),
    ("corda", config(corda_config={"cache_file": "/etc/passwd"}), "corda_config="),
    ("sampling variant", config(monteclora_config={"num_samples": 2}), "monteclora_config="),
    ("sampling variant by default", config(monteclora_config={}), "monteclora_config={} is refused"),
    ("variant that rewrites the base", config(kasa_config={}), "kasa_config={} is refused"),
    ("projected variant", config(velora_config={}), "velora_config={} is refused"),
    ("routing variant", config(arrow_config={}), "arrow_config={} is refused"),
    ("block-diagonal everywhere", config(use_bdlora={"target_modules_bd_a": ["q_proj"]}), "use_bdlora="),
    ("block-diagonal by default", config(use_bdlora={}), "use_bdlora={} is refused"),
    ("mlx-lm", config_text(lambda text: MLX), "is MLX-LM's, another format.*mlx_lm.fuse"),
    ("adapterhub", config_text(lambda text: ADAPTERHUB), "is AdapterHub's"),
    (
        "git-lfs",
        config_text(lambda text: LFS_POINTER),
        "adapter_config.json is a Git LFS pointer.*git lfs pull",
    ),
    ("terminal escape", config(peft_version="\x1b]0;owned\x07\x1b[2J"), r"'\\x1b\]0;owned"),
    ("escape in the base's name", config(base_model_name_or_path="a\x1b[31m\nb"), r"'a\\x1b\[31m"),
    ("text without end", config(peft_version="9" * 10_000), "not printable or too long"),
    ("lone surrogate", config_text(lambda t: t.replace("LORA", r"LORA\ud800")), "not LORA"),
]

# ------------------------------------------------------------------------------------------------- weights


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Edit the header of the weights file and leave its data as it is."""

    def spoil(member: Path) -> None:
        data = (member / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        raw_header(member, json.dumps(entries).encode(), data[8 + length :])

    return spoil


def raw_header(member: Path, text: bytes, data: bytes) -> None:
    (member / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def header_length(length: int) -> Spoil:
    def spoil(member: Path) -> None:
        data = (member / WEIGHTS).read_bytes()
        (member / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])

    return spoil


def oversized_header(member: Path) -> None:
    raw_header(member, b"{" + b" " * (17 << 20) + b"}", b"")


def duplicated_tensor(member: Path) -> None:
    data = (member / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].strip()
    entries = json.loads(text)
    name = next(name for name in entries if name != "__metadata__")
    again = json.dumps({name: entries[name]}).encode()[1:]
    raw_header(member, text[:-1] + b"," + again, data[8 + length :])


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(info for info in entries.values() if info.get("data_offsets", [1])[0] == 0)


def shift(by: tuple[int, int]) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        info = first(entries)
        info["data_offsets"] = [a + b for a, b in zip(info["data_offsets"], by, strict=True)]

    return change


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Spoil:
    def spoil(member: Path) -> None:
        values = load_file(member / WEIGHTS)
        change(values)
        save_file(values, member / WEIGHTS, metadata={"format": "pt"})

    return spoil


def put(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda values: values[f"{LAYER}.lora_A.weight"].__setitem__((1, 2), value)


def in_bfloat16(value: float) -> Spoil:
    """Save the weights as bfloat16, which numpy cannot read, with one ``value`` among them."""

    def spoil(member: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        values = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(member / WEIGHTS).items()}
        values[f"{LAYER}.lora_B.weight"][0, 0] = value
        save_file(values, member / WEIGHTS)

    return spoil


def renamed(old: str, new: str) -> Spoil:
    return tensors(lambda values: values.update({new: values.pop(old)}))


def added(name: str, *shape: int) -> Spoil:
    return tensors(lambda values: values.update({name: np.ones(shape, np.float32)}))


def truncated(keep: Callable[[int], int]) -> Spoil:
    def spoil(member: Path) -> None:
        os.truncate(member / WEIGHTS, keep((member / WEIGHTS).stat().st_size))

    return spoil


A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
OTHER = LAYER.replace("q_proj", "o_proj")

WEIGHTS_CASES: list[Case] = [
    (
        "git-lfs",
        lambda m: (m / WEIGHTS).write_text(LFS_POINTER),
        "safetensors is a Git LFS pointer.*git lfs pull",
    ),
    ("empty file", truncated(lambda size: 0), "not a readable safetensors"),
    ("truncated header", truncated(lambda size: 100), "header is longer than the file"),
    ("truncated data", truncated(lambda size: size - 1), "not a readable safetensors"),
    ("terabytes of nothing", lambda m: os.truncate(m / WEIGHTS, 1 << 40), "an adapter has at most"),
    ("trailing data", lambda m: (m / WEIGHTS).open("ab").write(b"#!/bin/sh"), "not a readable safetensors"),
    ("oversized header", oversized_header, "has a header of"),
    ("header longer than the file", header_length(10**9), "header is longer than the file"),
    ("header of 2**64 - 1 bytes", header_length(2**64 - 1), "header is longer than the file"),
    ("header is a list", lambda m: raw_header(m, b"[]", b""), "not a readable safetensors"),
    ("header is deep", lambda m: raw_header(m, DEEP.encode(), b""), "not a readable safetensors.*nested"),
    ("header not utf-8", lambda m: raw_header(m, b'{"\xff": 1}', b""), "not a readable safetensors"),
    ("header of no tensors", lambda m: raw_header(m, b"{}", b""), "holds no LoRA matrices"),
    ("overlapping tensors", header(shift((4, 4))), "not a readable safetensors"),
    ("gap between tensors", header(shift((0, -4))), "not a readable safetensors"),
    ("offsets beyond the file", header(shift((10**9, 10**9))), "not a readable safetensors"),
    ("negative offsets", header(shift((-8, -8))), "not a readable safetensors"),
    ("tensor twice", duplicated_tensor, "is there twice"),
    ("unknown type", header(lambda h: first(h).update(dtype="PICKLE")), "not a readable safetensors"),
    ("whole numbers", header(lambda h: first(h).update(dtype="I32")), "has type I32"),
    ("more than a header says", header(lambda h: first(h).update(reader="canary_module")), "has type F32"),
    ("shape beyond its bytes", header(lambda h: first(h).update(shape=[2**40, 48])), "not a readable"),
    ("shape that overflows", header(lambda h: first(h).update(shape=[2**62, 2**62])), "not a readable"),
    ("escape in a tensor's name", renamed(A, f"{LAYER}\x1b[2J.lora_A.weight"), r"called '.*\\x1b\[2J"),
    ("path in a tensor's name", renamed(A, "../../etc.lora_A.weight"), "which PEFT does not write"),
    ("nan", tensors(put(np.nan)), "layers.0.self_attn.q_proj.lora_A.weight that is not finite"),
    ("infinity", tensors(put(-np.inf)), "layers.0.self_attn.q_proj.lora_A.weight that is not finite"),
    ("nan in bfloat16", in_bfloat16(float("nan")), "lora_B.weight that is not finite"),
    ("infinity in bfloat16", in_bfloat16(float("inf")), "lora_B.weight that is not finite"),
    ("other rank than configured", config(r=8), "not of rank 8 as configured"),
    ("other rank in one layer", tensors(lambda v: v.update({A: v[A][:3].copy()})), "not of rank 4"),
    ("lora_B missing", tensors(lambda v: v.pop(B)), "lacks one of lora_A and lora_B"),
    ("matrix that is a vector", tensors(lambda v: v.update({A: v[A][0].copy()})), "not of rank 4"),
    (
        "layer that is not targeted",
        tensors(lambda v: v.update({f"{OTHER}.lora_A.weight": v[A], f"{OTHER}.lora_B.weight": v[B]})),
        "o_proj, which adapter_config.json does not target",
    ),
    ("layer outside layers_to_transform", config(layers_to_transform=[1, 2]), "does not target"),
    ("replaces a layer of the base", added("base_model.model.model.norm.weight", 48), "does not call for"),
    (
        "replaces a base layer inside",
        added(f"{OTHER}.base_layer.weight", 48, 48),
        "of a layer that it does not",
    ),
    ("an adapter's name left in", renamed(A, f"{LAYER}.lora_A.default.weight"), "does not call for"),
    ("magnitudes without dora", added(f"{LAYER}.lora_magnitude_vector", 48), "disagree on magnitude"),
    ("dora without magnitudes", config(use_dora=True), "disagree on magnitude"),
]

# ------------------------------------------------------------------------------------------- what lies where


class Canary:
    """Unpickling it creates the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def pickle_only(member: Path) -> None:
    (member / WEIGHTS).unlink()
    pickle_beside(member)


def pickle_beside(member: Path) -> None:
    """Put pickles with the canary under every name that some loader reads."""
    for name in ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "training_args.bin"):
        (member / name).write_bytes(pickle.dumps(Canary(member.parent.parent / "canary")))


def pickle_named_safetensors(member: Path) -> None:
    (member / WEIGHTS).write_bytes(pickle.dumps(Canary(member.parent.parent / "canary")))


def linked_away(name: str) -> Spoil:
    """Move a file out of the ensemble and leave a link to it."""

    def spoil(member: Path) -> None:
        target = member.parent.parent / f"outside-{name}"
        (member / name).rename(target)
        (member / name).symlink_to(target)

    return spoil


def folder_linked_away(member: Path) -> None:
    target = member.parent.parent / "outside"
    member.rename(target)
    member.symlink_to(target, target_is_directory=True)


def circle(member: Path) -> None:
    (member / WEIGHTS).unlink()
    (member / WEIGHTS).symlink_to(member / WEIGHTS)


def replaced_by(make: Callable[[Path], object], name: str) -> Spoil:
    def spoil(member: Path) -> None:
        (member / name).unlink()
        make(member / name)

    return spoil


PLACE_CASES: list[Case] = [
    ("pickle only", pickle_only, "adapter_model.bin only, a pickle.*`lora-ensemble convert .*member_01`"),
    ("no weights", lambda member: (member / WEIGHTS).unlink(), "has no adapter_model.safetensors; copy"),
    ("pickle called safetensors", pickle_named_safetensors, "not a readable safetensors"),
    ("configuration linked away", linked_away(CONFIG), "which lies outside"),
    ("weights linked away", linked_away(WEIGHTS), "which lies outside"),
    ("folder linked away", folder_linked_away, "which lies outside"),
    ("weights linked in a circle", circle, "cannot be followed|has no adapter_model"),
    ("configuration is a folder", replaced_by(Path.mkdir, CONFIG), "not a file|is not an adapter"),
    ("weights are a folder", replaced_by(Path.mkdir, WEIGHTS), "not a file"),
    ("weights are a pipe", replaced_by(os.mkfifo, WEIGHTS), "not a file"),
    ("configuration is a pipe", replaced_by(os.mkfifo, CONFIG), "not a file|is not an adapter"),
    (
        "weights are a device",
        replaced_by(lambda path: path.symlink_to("/dev/zero"), WEIGHTS),
        "which lies outside",
    ),
]

MEMBER_CASES = CONFIG_CASES + WEIGHTS_CASES + PLACE_CASES

# --------------------------------------------------------------------------------- the folder and its manifest


def manifest(base: str = "tiny", **changes: object) -> Spoil:
    """Write an ensemble.json of two members; ``changes`` are made to the second one's entry."""

    def spoil(folder: Path) -> None:
        entries = [{"name": name, "folder": name} for name in ("member_00", "member_01")]
        entries[1].update(changes)
        (folder / "ensemble.json").write_text(
            json.dumps({"schema_version": 1, "base_model": base, "revision": None, "members": entries})
        )

    return spoil


def manifest_text(text: str) -> Spoil:
    return lambda folder: (folder / "ensemble.json").write_text(text)


def copied_out(spoil: Spoil) -> Spoil:
    """Put a sound adapter where the manifest must not reach."""

    def both(folder: Path) -> None:
        shutil.copytree(folder / "member_01", folder.parent / "outside")
        spoil(folder)

    return both


FOLDER_CASES: list[Case] = [
    ("manifest climbs", copied_out(manifest(folder="../outside")), "lies outside"),
    ("manifest is absolute", manifest(folder="/etc"), "lies outside"),
    ("manifest's epoch climbs", copied_out(manifest(epochs={"1": "../outside"})), "lies outside"),
    ("manifest's epoch is absolute", manifest(epochs={"1": "/etc"}), "lies outside"),
    ("manifest's name has an escape", manifest(name="\x1b[2Jmember"), "not printable text"),
    ("manifest's folder has a nul", manifest(folder="a\0b"), "not printable text"),
    ("manifest's folder is without end", manifest(folder="x" * 5000), "cannot be followed|lies outside"),
    ("manifest's folder is a list", manifest(folder=["member_01"]), "not printable text"),
    ("manifest has a key of its own", manifest(loader=CANARY_MODULE), "unexpected keyword argument 'loader'"),
    ("manifest has a member twice", manifest(name="member_00"), "two members have the same name"),
    ("manifest is deep", manifest_text(DEEP), "nested deeper"),
    ("manifest has a key twice", manifest_text('{"schema_version": 1, "schema_version": 1}'), "there twice"),
    ("manifest is huge", manifest_text(" " * (17 << 20)), "larger than"),
    (
        "manifest linked away",
        lambda folder: (folder / "ensemble.json").symlink_to("/proc/self/status"),
        "lies outside",
    ),
    (
        "escape in a folder's name",
        lambda folder: (folder / "member_01").rename(folder / "member\x1b[2J"),
        r"called 'member\\x1b\[2J'",
    ),
]
