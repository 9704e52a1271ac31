"""Members as PEFT adapters: made by PEFT, written as plain PEFT folders."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_lora_ensemble.errors import EnsembleError, first_line

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.base import Base
    from lm_eval_lora_ensemble.train.posterior_state import PosteriorState
    from lm_eval_lora_ensemble.train.recipe import Recipe


def lora_config(recipe: Recipe, base: Base) -> Any:
    """Return the ``peft.LoraConfig`` that a recipe describes."""
    from peft import LoraConfig, TaskType

    modules = recipe.target_modules
    if modules == "all-linear" and recipe.layers is not None:
        modules = tuple(linear_names(base.model))  # PEFT restricts named modules to layers, not this word
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base.name,
        revision=recipe.revision,
        r=recipe.rank,
        lora_alpha=int(recipe.alpha) if recipe.alpha.is_integer() else recipe.alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        target_modules=modules if isinstance(modules, str) else list(modules),
        layers_to_transform=None if recipe.layers is None else list(recipe.layers),
    )


def attach(base: Base, recipe: Recipe, members: dict[str, int]) -> Any:
    """Put one adapter a member on the base model and return the ``PeftModel``.

    PEFT draws each member's initial weights itself, from the global generator seeded with the member's seed:
    they are those of a run of PEFT alone with that seed.

    Args:
        base: the base model; its target layers are wrapped in place.
        recipe: the run's recipe.
        members: seed of each member by name.
    """
    from peft import get_peft_model

    model = None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 reads transformers' old name, which is PEFT's to mend and nobody else's to read about.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # refused below
        for name, seed in members.items():
            torch.manual_seed(seed)
            config = lora_config(recipe, base)
            if model is None:
                try:
                    model = get_peft_model(base.model, config, adapter_name=name)
                except ValueError as error:
                    raise EnsembleError(
                        f"target_modules {recipe.target_modules!r} do not fit {base.name}: "
                        f"{first_line(error)}; its linear layers are called "
                        f"{', '.join(linear_names(base.model))}"
                    ) from error
            else:
                model.add_adapter(name, config)
            # PEFT puts the name the weights were loaded by; an adapter has to name what others can load.
            config.base_model_name_or_path = base.name
    _refuse_tied_embeddings(model, base)
    return model


def _refuse_tied_embeddings(model: Any, base: Base) -> None:
    """Refuse adapters on one of two layers that share their weights: lm-eval cannot load such a model.

    Its ``hf``, which ours is made of, ties the weights anew once the adapters are on, and the head inside its
    adapter is not where transformers looks for it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    ]
    weights = {id(getattr(layer, "base_layer", layer).weight) for layer in layers}
    if len(weights) < len(layers) and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        raise EnsembleError(
            f"target_modules adapt the output head or the embedding of {base.name}, which share their weights "
            "(tie_word_embeddings): lm-eval cannot score such adapters; leave lm_head and embed_tokens out"
        )


def linear_names(model: Any) -> list[str]:
    """Return the distinct last names of a model's linear layers, its output head aside."""
    head = model.get_output_embeddings()
    linear = (
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    return sorted({name.rpartition(".")[2] for name in linear})


def initial_folders(recipe: Recipe, base: str) -> list[Path]:
    """Return the adapter folder each member starts from, one a member; empty if they start afresh.

    Args:
        recipe: the run's recipe.
        base: name of the base model, which an adapter need not name itself.
    """
    from lm_eval_lora_ensemble.ensemble.members import find_ensemble

    if not recipe.initial_adapters:
        return []
    source = recipe.initial_adapters[0] if len(recipe.initial_adapters) == 1 else recipe.initial_adapters
    ensemble = find_ensemble(source, pretrained=base, allow_base_mismatch=True)
    folders = [member.folder for member in ensemble.members]
    if len(folders) == 1:
        folders *= recipe.members
    if len(folders) != recipe.members:
        raise EnsembleError(
            f"initial_adapters {', '.join(recipe.initial_adapters)} hold {len(folders)} adapters "
            f"for {recipe.members} members; set members={len(folders)}"
        )
    return folders


def load_initial(model: Any, name: str, folder: Path) -> None:
    """Load an adapter folder's weights into the adapter ``name``; shapes must be the recipe's."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        result = set_peft_model_state_dict(
            model, load_file(folder / "adapter_model.safetensors"), adapter_name=name
        )
    except (RuntimeError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise EnsembleError(
            f"initial adapter {folder} does not fit the recipe: {reason}; "
            "give the recipe the rank and target modules of that adapter"
        ) from error
    missing = [key for key in result.missing_keys if "lora_" in key and f".{name}." in key]
    if missing or result.unexpected_keys:
        raise EnsembleError(
            f"initial adapter {folder} has other layers than the recipe's target_modules "
            f"({len(missing)} missing, {len(result.unexpected_keys)} too many); use those it was trained with"
        )


def save(
    folder: Path,
    *,
    weights: dict[str, torch.Tensor],
    config: Any,
    card: str,
    recipe_yaml: str,
    posterior: PosteriorState | None = None,
) -> None:
    """Write a PEFT adapter folder into the existing, empty ``folder``, and beside it what its optimiser learnt."""
    from safetensors.torch import save_file

    config = copy.deepcopy(config)
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        # PEFT writes a set in its hash order, which differs from one process to the next.
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    tensors = {key: weight.detach().to("cpu").contiguous() for key, weight in weights.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    if posterior is not None:
        posterior.write(folder)


def lora_layers(model: Any) -> dict[str, Any]:
    """Return the modules that PEFT wrapped, by their name in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: module
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def stacking_obstacle(model: Any, recipe: Recipe) -> str | None:
    """Say what keeps the members from being trained in one batch, or None if nothing does."""
    from peft.tuners.lora import Linear

    if recipe.dora:
        return "DoRA's magnitudes are not stacked"
    for name, module in lora_layers(model).items():
        if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear:
            return (
                f"{name} is a {type(module).__name__} around {type(module.base_layer).__name__}, not a Linear"
            )
    return None
