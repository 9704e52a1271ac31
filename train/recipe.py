"""What a training run is told: one flat YAML file, every key checked, nothing guessed.

A recipe is read from a file (or a bundled recipe's name) and ``key=value`` overrides. Every mistake ends in
one line that names the key, the place and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lm_eval_lora_ensemble.disk import recipes_folder
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train import knobs

FILE_NAME = "recipe.yaml"

#: Keys that say how a run is carried out, not what it computes: they may change when a run is resumed.
OPERATIONAL = frozenset(
    {"device", "output", "report_to", "checkpoint_steps", "keep_checkpoints", "members_at_once"}
)


@dataclass(frozen=True)
class Recipe:
    """Every knob of a training run, checked.

    The YAML keys are the attribute names. Lengths are in tokens, the batch size in documents, the learning
    rate per optimiser step. ``knobs.CHECKS`` holds each key's admissible values.
    """

    # What is trained, on what
    base_model: str
    task: tuple[str, ...]
    revision: str | None = None
    include_path: str | None = None
    num_fewshot: int | None = None
    objective: str = "answer"
    output: str = "./ensemble"
    # The ensemble
    members: int = 5
    seed: int = 0
    initial_adapters: tuple[str, ...] = ()
    # The adapter
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ("q_proj", "v_proj")
    layers: tuple[int, ...] | None = None
    # The optimiser
    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    lora_l2: float = 0.0
    lora_b_l2: float = 0.0
    gradient_clip: float | None = 1.0
    # How long
    epochs: int = 1
    max_steps: int | None = None
    early_stopping: int | None = None
    # The data
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int | None = None
    truncate: str = "refuse"
    train_limit: int | None = None
    validation_limit: int | None = None
    subset_seed: int | None = None
    shuffle: bool = True
    length_groups: bool = True
    # The machine
    dtype: str = "auto"
    quantization: str = "none"
    gradient_checkpointing: bool = False
    engine: str = "auto"
    members_at_once: int | None = None
    device: str = "auto"
    # Seen from outside
    checkpoint_steps: int | None = 100
    keep_checkpoints: int = 2
    report_to: tuple[str, ...] = ()

    @classmethod
    def load(cls, source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe file, or the bundled recipe of that name, and apply ``key=value`` overrides.

        Raises:
            EnsembleError: no such recipe, no YAML mapping, an unknown key, or a value out of its range.
        """
        path = find(source)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise EnsembleError(
                f"recipe {path} cannot be read: {error}; it must be a YAML file of key: value lines"
            ) from error
        if not isinstance(values, dict):
            raise EnsembleError(
                f"recipe {path} holds no key: value lines; see the recipes in {recipes_folder()}"
            )
        return cls.from_mapping({**values, **parse_overrides(overrides)}, where=str(path))

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any], where: str = "recipe") -> Recipe:
        """Check ``values`` and build the recipe; ``where`` names their source in errors."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise EnsembleError(f"{where}: unknown key {key!r}; {_nearest(str(key), known)}")
        for key in ("base_model", "task"):
            if values.get(key) in (None, "", []):
                raise EnsembleError(f"{where}: no {key}; add a line '{key}: …' or give {key}=…")
        recipe = cls(**{key: _checked(key, value, where) for key, value in values.items()})
        _check_together(recipe, where)
        return recipe

    def as_mapping(self, *, operational: bool = True) -> dict[str, Any]:
        """Return the keys and values in plain YAML types, with or without the operational ones."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if operational or key not in OPERATIONAL
        }

    def as_yaml(self, *, operational: bool = True) -> str:
        """Return the resolved recipe as YAML text that :meth:`load` reads back."""
        return yaml.safe_dump(self.as_mapping(operational=operational), sort_keys=False, allow_unicode=True)

    def differences(self, other: Recipe) -> list[str]:
        """Return the keys on which two recipes would compute different members."""
        mine, theirs = self.as_mapping(), other.as_mapping()
        return [key for key in mine if key not in OPERATIONAL and mine[key] != theirs[key]]

    @property
    def scaling(self) -> float:
        """The factor of B·A: alpha / rank, or alpha / √rank for rank-stabilised LoRA."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))


def find(source: str | Path) -> Path:
    """Return the path of a recipe given as a file or as a bundled recipe's name."""
    path = Path(source)
    if path.is_file():
        return path
    bundled = {recipe.stem: recipe for recipe in sorted(recipes_folder().glob("*.yaml"))}
    name = path.name.removesuffix(".yaml")
    if name in bundled and path.parent == Path():
        return bundled[name]
    raise EnsembleError(
        f"no recipe {str(source)!r}: neither a file nor a bundled recipe ({', '.join(bundled)})"
    )


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Parse ``key=value`` words; values are read as YAML."""
    values: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise EnsembleError(f"{word!r} is no override; write key=value, for example members=3")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise EnsembleError(f"the value of override {word!r} is not YAML; quote it") from error
    return values


def _nearest(key: str, known: list[str]) -> str:
    """Say which known key was probably meant."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _checked(key: str, value: Any, where: str) -> Any:
    check = knobs.CHECKS[key]
    try:
        return check(value)
    except (ValueError, TypeError, OverflowError):
        raise EnsembleError(f"{where}: {key} is {value!r}, it must be {check.expectation}") from None


def _check_together(recipe: Recipe, where: str) -> None:
    """Refuse values that are each fine but not together."""
    if recipe.early_stopping is not None and recipe.validation_limit == 0:
        raise EnsembleError(f"{where}: early_stopping needs validation documents, validation_limit is 0")
    given = len(recipe.initial_adapters)
    if given not in (0, 1, recipe.members):
        raise EnsembleError(
            f"{where}: initial_adapters names {given} folders for {recipe.members} members; "
            "give one ensemble folder, one adapter for all, or one for each member"
        )
