"""Every method that draws members, by name: the registry that the command, the docs and the tests are made from.

A method is one function under :func:`method`. The package's own are in ``methods/``, one a file; other distributions
name theirs in the entry-point group :data:`ENTRY_POINTS`. Both are loaded when :data:`METHODS` is first read, so a
module that registers a method may import this one freely. ``docs/extend.md`` adds one, step by step.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Literal, TypeVar

from lm_eval_lora_ensemble.errors import EnsembleError, nearest, one_line
from lm_eval_lora_ensemble.posterior.contract import Posterior
from lm_eval_lora_ensemble.posterior.options import Option

logger = logging.getLogger(__name__)

ENTRY_POINTS = "lm_eval_lora_ensemble.posteriors"
"""The entry-point group in whose modules other distributions register methods."""

COMMAND = {
    "draws": Option(None, "members to draw; 10, or all there are where a method has fewer", int, minimum=1),
    "draws_per_member": Option(
        None, "of an ensemble of several: draws from each member, instead of `draws` in all", int, minimum=1
    ),
    "member": Option(None, "of an ensemble of several: draw from this one alone, from 0", int, minimum=0),
    "seed": Option(0, "of the draws"),
    "output": Option("drawn", "folder to write"),
    "pretrained": Option(None, "the base model, where the adapters name none"),
}
"""What every method takes."""
COMMAND_OF_SNAPSHOTS = {
    "kept": Option(
        None,
        "which adapters that training kept: of epochs or of steps; steps where there are any",
        choices=("epochs", "steps"),
    ),
}
"""What methods of snapshots take besides."""
COMMAND_OF_TASKS = {
    "task": Option(None, "lm-eval task that the method fits on; required"),
    "split": Option("training", "of the task", choices=("training", "validation")),
    "limit": Option(None, "only the first N documents", int, minimum=1),
    "num_fewshot": Option(None, "examples in the context; the task's own number", int, minimum=0),
    "model_args": Option("", "`K=V,…`, further arguments of the model, as lm-eval's"),
    "include_path": Option(None, "a folder of further task YAMLs"),
}
"""What methods that fit on a task take besides."""

Needs = Literal["adapter", "snapshots", "state"]
Fit = Callable[..., Posterior]
_Function = TypeVar("_Function", bound=Fit)

_METHODS = "lm_eval_lora_ensemble.posterior.methods"
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Method:
    """What a method is, and what it takes.

    Attributes:
        name: on the command line, in manifests and reports.
        title: what it is, in a few words.
        needs: ``adapter``: ``source.adapters`` has exactly one; ``snapshots``: the kept snapshots of one run, in order;
            ``state``: one adapter with files of a posterior that was trained beside it.
        source: a paper; may be empty.
        task: whether it fits on documents of a task, which ``fit`` gets as ``data``.
        every_member: whether it is over all members of an ensemble, with equal shares of the draws.
        options: its own, by name.
        module: where it was registered.
        fit: ``fit(source, data, **options) -> Posterior``; ``data`` is None unless ``task``.
    """

    name: str
    title: str
    needs: Needs
    source: str
    task: bool
    every_member: bool
    options: Mapping[str, Option]
    module: str
    fit: Fit

    @property
    def command_options(self) -> dict[str, Option]:
        """What the command takes for it besides its own options."""
        return {
            **COMMAND,
            **(COMMAND_OF_SNAPSHOTS if self.needs == "snapshots" else {}),
            **(COMMAND_OF_TASKS if self.task else {}),
        }

    @property
    def built_in(self) -> bool:
        """Whether it comes with the package."""
        return self.module.startswith(f"{_METHODS}.")


@dataclass
class Registry(Mapping[str, Method]):
    """All methods by name, in order of registration; filled when it is first read."""

    _methods: dict[str, Method] = field(default_factory=dict)
    _filled: bool = False

    def add(self, one: Method) -> None:
        """Register a method; the same module may register it again, as a notebook's cell does.

        Raises:
            EnsembleError: a name that is malformed or another module's, or an option that the command has already.
        """
        if not _NAME.fullmatch(one.name):
            raise EnsembleError(
                f"{one.module}: a method cannot be called {one_line(one.name)!r}; lower-case letters, digits and "
                "underscores"
            )
        taken = sorted(set(one.options) & {*COMMAND, *COMMAND_OF_SNAPSHOTS, *COMMAND_OF_TASKS})
        if taken:
            raise EnsembleError(
                f"{one.module}: the option {taken[0]!r} of {one.name} is the command's already; name it otherwise"
            )
        self._fill()  # the package's own come first, in the tables and where names collide
        other = self._methods.get(one.name)
        if other is not None and other.module != one.module:
            raise EnsembleError(
                f"{one.module}: the method {one.name!r} is registered by {other.module} already; name yours otherwise"
            )
        self._methods[one.name] = one

    def find(self, name: str) -> Method:
        """Return a method by the name that a user gave.

        Raises:
            EnsembleError: there is none of that name.
        """
        if name not in self:
            near = nearest(name, self)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(self)}"
            raise EnsembleError(f"no method {one_line(name)!r} draws members; {hint}")
        return self[name]

    def __getitem__(self, name: str) -> Method:
        """Return a method; a name that is not registered is a KeyError."""
        self._fill()
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        self._fill()
        return iter(tuple(self._methods))

    def __len__(self) -> int:
        """How many there are."""
        self._fill()
        return len(self._methods)

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = True
        own = importlib.import_module(_METHODS)
        for found in pkgutil.iter_modules(own.__path__, f"{_METHODS}."):
            importlib.import_module(found.name)
        for entry in entry_points(group=ENTRY_POINTS):
            _load(entry)


def _load(entry: EntryPoint) -> None:
    """Import what another distribution names; its failure must not stop a command."""
    try:
        entry.load()
    except Exception as error:  # noqa: BLE001 - a stranger's module may raise anything
        logger.warning(
            "the posteriors of %s cannot be loaded (%s: %s) and are left out; mend or uninstall it",
            entry.value,
            type(error).__name__,
            one_line(error),
        )


METHODS = Registry()
"""The registry that everything reads."""


def method(
    *,
    name: str,
    title: str,
    needs: Needs,
    source: str = "",
    task: bool = False,
    every_member: bool = False,
    options: Mapping[str, Option] | None = None,
) -> Callable[[_Function], _Function]:
    """Register the decorated function as a method and return it unchanged.

    Args:
        name: on the command line.
        title: what it is, in a few words.
        needs: ``adapter`` (one), ``snapshots`` (the kept ones of a run, in order) or ``state`` (one adapter, and what
            a training run has left beside it).
        source: a paper.
        task: it fits on documents: the command takes ``task=`` and hands them over as ``data``.
        every_member: it is over all members of an ensemble, with equal shares of the draws.
        options: its own, by name; ``fit`` gets them as keywords.

    Raises:
        EnsembleError: a bad name, one that another module has registered, or an option of the command's.

    Example:
        >>> from lm_eval_lora_ensemble.posterior.contract import Posterior
        >>> from lm_eval_lora_ensemble.posterior.registry import METHODS, Option, method
        >>> @method(name="jitter", title="noise", needs="adapter", options={"sd": Option(0.01, "its size")})
        ... def fit(source, data, *, sd):
        ...     return Jitter(source.adapters[0], sd)
        >>> METHODS["jitter"].options["sd"].default
        0.01
    """

    def register(fit: _Function) -> _Function:
        METHODS.add(
            Method(
                name=name,
                title=title,
                needs=needs,
                source=source,
                task=task,
                every_member=every_member,
                options=dict(options or {}),
                module=str(getattr(fit, "__module__", "")),
                fit=fit,
            )
        )
        return fit

    return register
