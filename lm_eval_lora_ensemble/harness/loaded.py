"""A loaded ensemble for people without lm-eval's command: texts in, every member's loglikelihoods out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lm_eval.api.instance import Instance

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.arguments import DEVICE
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM


class LoadedEnsemble:
    """One base model with every member on it, ready to score.

    Attributes:
        model: the lm-eval model that does the work; lm-eval's ``simple_evaluate(model=…)`` takes it.
    """

    def __init__(self, model: LoraEnsembleLM) -> None:
        self.model = model

    @property
    def members(self) -> tuple[str, ...]:
        """The members' names, in the order of the first axis of every result; empty for the base model alone."""
        return tuple(member.name for member in self.model.ensemble.members)

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Refuse to be pickled, or copied: the base model is too large to go by value."""
        raise TypeError("a loaded ensemble cannot be pickled; call load_ensemble where it is needed")

    def loglikelihoods(
        self, contexts: Sequence[str], continuations: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """Score each continuation after its context with every member, exactly as lm-eval scores them.

        Shared beginnings are computed once, so ask for many at a time. The ensemble's own loglikelihood is the
        log-mean-exp over the first axis.

        Args:
            contexts: texts [R]; an empty one stands for the beginning of a text.
            continuations: texts [R], scored one to one; they mostly begin with a space.

        Returns:
            float64 [N, R], nats, each the sum over the continuation's tokens of log p(token given what is before).

        Raises:
            ValueError: not as many continuations as contexts.
            EnsembleError: an empty continuation, or a member's score that is NaN or infinite.

        Example:
            >>> from lm_eval_lora_ensemble import load_ensemble
            >>> ensemble = load_ensemble("base", "ensemble", device="cpu")
            >>> scores = ensemble.loglikelihoods(["The sky is"] * 3, [" blue", " red", " dark orange"])
            >>> scores.shape
            (2, 3)
        """
        pairs = list(zip(contexts, continuations, strict=True))
        empty = next((i for i, (_, continuation) in enumerate(pairs) if not continuation), None)
        if empty is not None:
            raise EnsembleError(f"continuations[{empty}] is empty; there is nothing to score")
        requests = [
            Instance("loglikelihood", doc={}, arguments=pair, idx=0, metadata=("loglikelihoods", i, 1))
            for i, pair in enumerate(pairs)
        ]
        results = self.model.loglikelihood(requests, disable_tqdm=True) if requests else []
        members = [value.members for value, _ in results]
        return np.stack(members, axis=1) if members else np.empty((self.model.n_members, 0))


def load_ensemble(
    base: str | Path | None = None,
    adapters: str | Path | Sequence[str | Path] | None = None,
    **model_args: Any,
) -> LoadedEnsemble:
    """Load a base model and its members, checked as data first.

    Args:
        base: the base model, a Hub id or a folder; None reads it from the adapters.
        adapters: an ensemble folder, a folder of adapters, one adapter, a Hub id of an ensemble or an adapter
            (``org/name``, ``org/name@revision``), or a list of adapters; None takes ``./ensemble``.
        **model_args: whatever ``lm_eval --model_args`` takes: ``members``, ``epoch``, ``dtype``, ``device``
            (CUDA where there is any), ``batch_size`` …

    Raises:
        EnsembleError: the members cannot be found or do not fit together, or an argument is wrong.

    Example:
        >>> from lm_eval_lora_ensemble import load_ensemble
        >>> load_ensemble("base", "ensemble", device="cpu").members
        ('member_00', 'member_01')
    """
    chosen = adapters if adapters is None or isinstance(adapters, str) else _as_text(adapters)
    model_args.setdefault("device", DEVICE)
    pretrained = str(base) if isinstance(base, Path) else base
    return LoadedEnsemble(LoraEnsembleLM(pretrained=pretrained, adapters=chosen, **model_args))


def _as_text(adapters: Path | Sequence[str | Path]) -> str | list[str]:
    return str(adapters) if isinstance(adapters, Path) else [str(item) for item in adapters]
