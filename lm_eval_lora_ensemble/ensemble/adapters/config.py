"""adapter_config.json against an allow-list: every key known, every value bounded, nothing that names code.

The keys are ``peft.LoraConfig``'s, of PEFT 0.21 and the releases before it. Not accepted although PEFT knows
them: what changes the base model under the other members (``bias``, ``layer_replication``, initialisations
from the base's weights such as PiSSA), LoRA variants whose forward pass is another one, and what names code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from lm_eval_lora_ensemble.disk import read_json
from lm_eval_lora_ensemble.ensemble.adapters.foreign import refuse_lfs_pointer, refuse_other_formats
from lm_eval_lora_ensemble.errors import EnsembleError

MAX_BYTES = 1 << 20
MAX_RANK = 16384  # the width of the widest open models: beyond it a product of two matrices saves nothing
MAX_ALPHA = 1e6
MAX_STRING = 4096
MAX_FILE_NAME = 255  # bytes; longer ones no file system has
PATTERN_SECONDS = 1.0
ALL_LINEAR = "all-linear"

# what a key of no known name may not even hint at
_CODE = re.compile(r"auto_map|code|class|import|library|module_path|plugin|script|exec|_target_|url|endpoint")
_TRANSFORMERS_MODULE = re.compile(r"transformers\.models\.\w+(\.\w+)*", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]{0,254}", re.ASCII)
# Unsloth marks what it saved with this; no repository has a branch of that name for it
_NO_REVISION = "unsloth"
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]{2}|[/\\]{2}")
_BASE_CHANGING_INIT = "is made from the base model's weights, which it changes for every other member"


@dataclass(frozen=True)
class AdapterConfig:
    """What a checked adapter_config.json says.

    Attributes:
        path: the file.
        base_model: Hub id or folder of the base model; None if the file names none.
        revision: of the base model, where named.
        rank: of every adapted layer that ``rank_pattern`` does not mention.
        values: the whole file; every value has passed its rule.
    """

    path: Path
    base_model: str | None
    revision: str | None
    rank: int
    values: dict[str, Any]

    def on(self, key: str) -> bool:
        """Whether the option ``key`` is there and switched on."""
        return not _is_off(self.values.get(key))

    def rank_of(self, module: str) -> int:
        """Return the rank of the adapted layer ``module``, by the first pattern that matches, as PEFT does."""
        patterns: dict[str, int] = self.values.get("rank_pattern") or {}
        for pattern, rank in patterns.items():
            if self._matches(rf"(.*\.)?({pattern})", module):
                return rank
        return self.rank

    def targets(self, module: str) -> bool:
        """Whether the configuration adapts the layer ``module``, as far as the name alone decides."""
        wanted = self.values.get("target_modules")
        if wanted is None or wanted == ALL_LINEAR:
            return True
        if isinstance(wanted, str):
            return self._matches(wanted, module)
        if module in wanted:
            return True
        return module.endswith(tuple(f".{name}" for name in wanted)) and self._in_layers(module)

    def saves(self, module: str) -> bool:
        """Whether ``modules_to_save`` names the module or one around it, by the end of its name as in PEFT."""
        saved = tuple(self.values.get("modules_to_save") or ())
        parts = module.split(".")
        return any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))

    def _in_layers(self, module: str) -> bool:
        layers = self.values.get("layers_to_transform")
        if _is_off(layers):
            return True
        index = next((int(part) for part in module.split(".") if part.isdecimal()), None)
        return index in (layers if isinstance(layers, list) else [layers])

    def _matches(self, pattern: str, module: str) -> bool:
        """Match the whole name, for a bounded time: a stranger's pattern may backtrack for ever."""
        try:
            return regex.fullmatch(pattern, module, timeout=PATTERN_SECONDS) is not None
        except TimeoutError as error:
            raise EnsembleError(
                f"{self.path}: the pattern {_shown(pattern)} takes more than {PATTERN_SECONDS} s to match; "
                "write a simpler one"
            ) from error
        except (regex.error, RecursionError, MemoryError) as error:
            raise EnsembleError(
                f"{self.path}: {_shown(pattern)} is no regular expression ({error})"
            ) from error


def read_config(path: Path) -> AdapterConfig:
    """Read and check one adapter_config.json.

    Raises:
        EnsembleError: unreadable, not LoRA, a key that is not known, or a value that is not allowed.
    """
    refuse_lfs_pointer(path)
    values = read_json(path, MAX_BYTES)
    if not isinstance(values, dict):
        raise EnsembleError(f"{path} holds no JSON object, so it configures no adapter; export it again")
    refuse_other_formats(path, values)
    if values.get("peft_type", "LORA") != "LORA":
        raise EnsembleError(f"{path} is of type {_shown(values['peft_type'])}, not LORA")
    for missing in {"peft_type", "r"} - set(values):
        raise EnsembleError(f"{path} lacks {missing}; export the adapter again")
    for text in _strings(values):
        if len(text) > MAX_STRING or not text.isprintable():
            raise EnsembleError(f"{path} holds the text {_shown(text)}, which is not printable or too long")
    for key, value in values.items():
        _check_value(path, key, value)
    revision = values.get("revision")
    return AdapterConfig(
        path,
        base_model=values.get("base_model_name_or_path") or None,
        revision=None if revision == _NO_REVISION else revision,
        rank=values["r"],
        values=values,
    )


def _check_value(path: Path, key: str, value: Any) -> None:
    if key in _RULES:
        allowed, reason = _RULES[key]
        if not allowed(value):
            raise EnsembleError(f"{path}: {key}={_shown(value)} is refused: {reason}")
        return
    if value is None or (_is_off(value) and not _CODE.search(key.lower())):
        return  # newer releases of PEFT write their new options switched off
    if _CODE.search(key.lower()):
        raise EnsembleError(
            f"{path}: {key}={_shown(value)} is refused: an adapter is data, it may name no code and no address"
        )
    raise EnsembleError(
        f"{path}: the key {_shown(key)} is not known to this release; remove it if the adapter is plain LoRA"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _strings(value: Any) -> Iterator[str]:
    """Yield every key and text inside ``value``."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _is_null(value: Any) -> bool:
    return value is None


def _is_bool(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_rank(value: Any) -> bool:
    return _is_int(value, 1, MAX_RANK)


def _is_alpha(value: Any) -> bool:
    return _is_number(value, 0, MAX_ALPHA)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    )


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(index, 0, 1 << 31) for index in value)


def _is_name_or_names(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


def _is_pattern_of(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(allowed, value.values())))


def _is_base_model(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, str) or _REMOTE.match(value):
        return False
    return all(len(part.encode()) <= MAX_FILE_NAME for part in value.split("/"))


def _is_transformers_class(value: Any) -> bool:
    """Whether an ``auto_mapping`` is what PEFT writes for a plain transformers model; nothing imports it.

    Tools add flags of their own, such as Unsloth's ``unsloth_fixed``: true, false and null name nothing.
    """
    if _is_off(value):
        return True
    if not isinstance(value, dict):
        return False
    named = {key: entry for key, entry in value.items() if not _is_bool(entry)}
    if not named:
        return True
    if set(named) != {"base_model_class", "parent_library"}:
        return False
    name, library = named["base_model_class"], named["parent_library"]
    return all(isinstance(text, str) for text in (name, library)) and bool(
        name.isidentifier() and _TRANSFORMERS_MODULE.fullmatch(library)
    )


def _are_token_indices(value: Any) -> bool:
    return (
        value is None
        or _are_indices(value)
        or (isinstance(value, dict) and all(map(_are_indices, value.values())))
    )


def _is_block_diagonal_nowhere(value: Any) -> bool:
    """Whether ``use_bdlora`` makes no layer block-diagonal, so that PEFT computes plain LoRA.

    Any dictionary switches PEFT's variant on; it leaves a layer plain if no pattern matches, which it refuses
    unless ``match_strict`` is false.
    """
    if value is None:
        return True
    patterns = ("target_modules_bd_a", "target_modules_bd_b")
    return (
        isinstance(value, dict)
        and set(value) <= {*patterns, "nblocks", "match_strict"}
        and not any(value.get(key) for key in patterns)
        and value.get("match_strict") is False
        and _is_int(value.get("nblocks", 1), 1, 1 << 16)
    )


def _are_eva_settings(value: Any) -> bool:
    """Whether EVA's settings are its own numbers; they steer an initialisation that is over."""
    known = {"rho", "tau", "use_label_mask", "label_mask_value", "whiten", "adjust_scaling_factors"}
    return _is_off(value) or (
        isinstance(value, dict)
        and set(value) <= known
        and all(isinstance(number, (bool, int, float)) for number in value.values())
    )


_PATTERN = "give numbers in the range of the option it overrides, by layer name"
_OTHER_FORWARD = "this release scores plain, rank-stabilised and weight-decomposed (DoRA) LoRA only"
_FLAG = (_is_bool, "say true or false")
_NAMES = (_is_name_or_names, "give one text or a list of texts")
_OTHER_VARIANT = (_is_off, _OTHER_FORWARD)
# PEFT reads these as settings, of which the empty ones are the variant's defaults: it is off only where there are none
_OTHER_VARIANT_SETTINGS = (_is_null, _OTHER_FORWARD)

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value == "LORA", "only LORA is scored"),
    "task_type": (
        lambda value: value in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"),
        "only language models are scored (CAUSAL_LM, SEQ_2_SEQ_LM)",
    ),
    "base_model_name_or_path": (_is_base_model, "a base model is a Hub id or a folder, not a remote address"),
    "revision": (
        lambda value: value is None or (isinstance(value, str) and _REVISION.fullmatch(value) is not None),
        "a revision is a branch, tag or commit",
    ),
    "auto_mapping": (_is_transformers_class, "it names a class to import"),
    "peft_version": (_is_text, "a version is a text"),
    "inference_mode": _FLAG,
    "r": (_is_rank, f"a rank is a whole number from 1 to {MAX_RANK}"),
    "lora_alpha": (_is_alpha, f"give a number from 0 to {MAX_ALPHA:g}"),
    "rank_pattern": (_is_pattern_of(_is_rank), f"{_PATTERN} (1 to {MAX_RANK})"),
    "alpha_pattern": (_is_pattern_of(_is_alpha), f"{_PATTERN} (0 to {MAX_ALPHA:g})"),
    "lora_dropout": (lambda value: value is None or _is_number(value, 0, 1), "give a number from 0 to 1"),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": (
        lambda value: value is None or _is_int(value, 0, 1 << 16) or _are_indices(value),
        "give layer numbers",
    ),
    "modules_to_save": (_are_names, "give a list of texts"),
    "trainable_token_indices": (_are_token_indices, "give token numbers"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "fan_in_fan_out": _FLAG,
    "ensure_weight_tying": _FLAG,
    "init_lora_weights": (
        lambda value: value in (None, True, False, "gaussian", "eva", "orthogonal"),
        f"such an adapter {_BASE_CHANGING_INIT}; save it with path_initial_model_for_weight_conversion",
    ),
    "eva_config": (_are_eva_settings, "only EVA's own numbers belong there"),
    "loftq_config": (_is_off, f"such an adapter {_BASE_CHANGING_INIT}"),
    "corda_config": (_is_off, f"such an adapter {_BASE_CHANGING_INIT}"),
    "lora_ga_config": (_is_off, f"such an adapter {_BASE_CHANGING_INIT}"),
    "bias": (
        lambda value: value in (None, "none"),
        "trained biases replace the base model's, for every other member too",
    ),
    "layer_replication": (_is_off, "it rebuilds the base model, for every other member too"),
    "megatron_config": (_is_off, "it configures code to import"),
    "megatron_core": (lambda value: value in (None, "megatron.core"), "it names a module to import"),
    "runtime_config": (_is_off, "what happens at run time is not an adapter's to say"),
    "use_qalora": _OTHER_VARIANT,
    "qalora_group_size": (lambda value: value is None or _is_int(value, 1, 1 << 16), "give a whole number"),
    "velora_config": _OTHER_VARIANT_SETTINGS,
    "alora_invocation_tokens": _OTHER_VARIANT,
    "monteclora_config": _OTHER_VARIANT_SETTINGS,
    "target_parameters": _OTHER_VARIANT,
    "use_bdlora": (_is_block_diagonal_nowhere, _OTHER_FORWARD),
    "arrow_config": _OTHER_VARIANT_SETTINGS,
    "kasa_config": _OTHER_VARIANT_SETTINGS,
    # written by the first releases of PEFT, ignored by the later ones
    "merge_weights": _FLAG,
    "enable_lora": (_is_off, _OTHER_FORWARD),
}
