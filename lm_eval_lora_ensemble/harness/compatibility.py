"""Is the installed lm-eval one that this release can extend? What it lacks is named before anything is patched."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from lm_eval_lora_ensemble.errors import EnsembleError, shorten_errors_of_command

OLDEST, TOO_NEW = "0.4.13", "0.5"
WANTED = f"lm-eval>={OLDEST},<{TOO_NEW}"

NEEDED: dict[str, tuple[str, ...]] = {
    "lm_eval.api.group": ("Group.aggregate",),
    "lm_eval.evaluator_utils": ("_collect_results",),
    "lm_eval.api.metrics": ("mean",),
    "lm_eval.api.registry": ("model_registry",),
    "lm_eval.api.task": (
        "ConfigurableTask.process_results",
        "ConfigurableTask.aggregation",
        "ConfigurableTask.higher_is_better",
    ),
    "lm_eval.config.group": ("AggMetricConfig",),
    "lm_eval.loggers": (
        "EvaluationTracker.save_results_aggregated",
        "EvaluationTracker.save_results_samples",
    ),
    "lm_eval.models.huggingface": (
        "HFLM._create_model",
        "HFLM._detect_batch_size",
        "HFLM._encode_pair",
        "HFLM._loglikelihood_tokens",
        "HFLM._model_call",
        "HFLM.get_model_info",
        "HFLM.set_cache_hook",
    ),
    "lm_eval.tasks._yaml_loader": ("load_yaml",),
    "lm_eval.tasks.manager": ("TaskManager",),
    "lm_eval.utils": (
        "get_rolling_token_windows",
        "make_disjoint_window",
        "sanitize_model_name",
        "simple_parse_args_string",
    ),
}
"""What of lm-eval is imported, overridden or wrapped, by module; most of it is no public interface of lm-eval's."""


def require_lm_eval(needed: Mapping[str, Sequence[str]] = NEEDED) -> None:
    """Refuse an lm-eval of another version than this release was written for, or without what it extends.

    Args:
        needed: dotted names by the module that must have them.

    Raises:
        EnsembleError: one line with the version that is installed and the versions that are wanted.
    """
    wrong = _wrong_version() or next(
        (
            f"has no {module}.{name}"
            for module, names in needed.items()
            for name in names
            if _lacks(module, name)
        ),
        None,
    )
    if wrong:
        shorten_errors_of_command(
            str
        )  # lm-eval imports us when its run has begun, and would show a traceback
        raise EnsembleError(
            f"the installed lm-eval ({_installed() or 'of unknown version'}) {wrong}; this release of "
            f"lm-eval-lora-ensemble needs another: pip install '{WANTED}'"
        )


def _installed() -> str | None:
    try:
        return version("lm-eval")
    except PackageNotFoundError:  # a checkout on the path: its names decide alone
        return None


def _wrong_version() -> str | None:
    installed = _installed()
    if installed and _numbers(installed) < _numbers(OLDEST):
        return f"is older than {OLDEST}"
    if installed and _numbers(installed) >= _numbers(TOO_NEW):
        return f"is of {TOO_NEW} or later, which computes metrics otherwise"
    return None


def _numbers(release: str) -> tuple[int, ...]:
    """Return a version's leading numbers: (0, 4, 13) of 0.4.13.dev1."""
    leading = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(number) for number in leading[0].split(".")) if leading else ()


def _lacks(module: str, name: str) -> bool:
    try:
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return True
    return False
