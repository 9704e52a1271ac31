"""Commands of the documentation held against the programs' own parsers, without running anything.

Words in capitals (TASK, FOLDER) stand for what a reader puts there and are not looked up. A variable of the shell
stands for a number.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command_parser
from conftest import PROJECT
from lm_eval._cli.harness import HarnessCLI
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.disk import recipes_folder
from lm_eval_lora_ensemble.ensemble.quantization import ARGUMENTS
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.arguments import parse_model_args
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.posterior.options import split_words
from lm_eval_lora_ensemble.posterior.plan import Settings
from lm_eval_lora_ensemble.posterior.registry import METHODS
from lm_eval_lora_ensemble.train.recipe import Recipe

_PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*(\.yaml)?")
_VARIABLE = re.compile(r"\$\{[^}]*\}|\$\w+")
# of transformers' from_pretrained and of vLLM-free lm-eval, which `hf` hands on unseen
_HANDED_ON = {"attn_implementation"}


class WrongCommandError(AssertionError):
    """A command that its program would not take, or that no check here knows."""


def check(words: list[str], own_files: Iterable[str] = ()) -> None:
    """Refuse a command that its program would refuse.

    Args:
        words: program and arguments.
        own_files: names of files that the page itself holds.

    Raises:
        WrongCommandError: what is wrong.
    """
    words = [_VARIABLE.sub("1", word) for word in words]
    program = Path(words[0]).name
    if program not in _CHECKS:
        raise WrongCommandError(
            f"no check knows the program {words[0]}; add one to tests/documented_commands.py"
        )
    try:
        _CHECKS[program](words[1:], set(own_files))
    except EnsembleError as error:
        raise WrongCommandError(str(error)) from error


def _parse(parser: Any, words: list[str], said: str) -> Any:
    """Parse as the program does, but raise instead of exiting."""

    def error(message: str) -> None:
        raise WrongCommandError(f"{said}: {message}")

    todo = [parser]
    while todo:
        one = todo.pop()
        one.error = error
        for action in one._actions:
            if isinstance(getattr(action, "choices", None), dict):
                todo.extend(action.choices.values())
    return parser.parse_args(words)


@functools.cache
def _tasks() -> TaskManager:
    return TaskManager()


def _check_tasks(names: Iterable[str], include_path: str | None = None) -> None:
    """Refuse names that lm-eval does not know; those of the page's own folder are its own affair."""
    if include_path is not None:
        return
    for name in names:
        given = name and not name.isdigit() and not _PLACEHOLDER.fullmatch(name)
        if given and not _tasks().match_tasks([name]):
            raise WrongCommandError(f"lm-eval has no task {name}")


def _check_model_args(given: dict[str, Any], model: str = "lora-ensemble") -> None:
    known = {*inspect.signature(HFLM.__init__).parameters, *_HANDED_ON}
    if model == "lora-ensemble":
        known |= {*inspect.signature(LoraEnsembleLM.__init__).parameters, *ARGUMENTS}
        known -= {"peft", "delta"}  # refused
    if unknown := given.keys() - (known - {"self", "kwargs"}):
        raise WrongCommandError(f"the model has no argument {', '.join(unknown)}")


def _lora_ensemble(words: list[str], own_files: set[str]) -> None:
    verb = next((word for word in words if word in cli.VERBS), None)
    if verb is None:
        raise WrongCommandError(f"lora-ensemble has no verb {' '.join(words[:1])}")
    arguments = _parse(cli._parser(verb), words, f"lora-ensemble {verb}")
    asked = vars(arguments)
    if verb == "train":
        bundled = {path.stem for path in recipes_folder().glob("*.yaml")}
        own = arguments.recipe if arguments.recipe in bundled else "smollm2_arc_easy"
        if own != arguments.recipe and not arguments.recipe.endswith(".yaml"):
            raise WrongCommandError(f"no bundled recipe {arguments.recipe}")
        _check_tasks(Recipe.load(own, arguments.overrides).task)
    if verb == "draw" and not _PLACEHOLDER.fullmatch(arguments.method):
        if arguments.method not in METHODS and own_files:
            return  # the page's own
        settings = Settings.of(METHODS.find(arguments.method), split_words(arguments.settings))
        _check_tasks((settings.command.get("task") or "").split(","), settings.command.get("include_path"))
    for key in ("task", "tasks", "ood", "calibrate"):
        value = asked.get(key) or ()
        # those of `analyse` and `report` are tasks of a run, looked up all the same
        names = value.split(",") if isinstance(value, str) else value
        _check_tasks(names, asked.get("include_path"))
    if asked.get("model_args"):
        _check_model_args(parse_model_args(asked["model_args"]))


def _lm_eval(words: list[str], own_files: set[str]) -> None:
    words = words if words[:1] and words[0] in ("run", "ls", "validate") else ["run", *words]
    arguments = _parse(HarnessCLI()._parser, words, "lm_eval")
    if words[0] != "run":
        return
    if arguments.model not in ("lora-ensemble", "hf", "dummy"):
        raise WrongCommandError(f"lm_eval run: a model of no page: {arguments.model}")
    _check_tasks(arguments.tasks or (), arguments.include_path)
    if arguments.model != "dummy":
        _check_model_args(arguments.model_args or {}, arguments.model)


def _accelerate(words: list[str], own_files: set[str]) -> None:
    if words[:1] != ["launch"]:
        raise WrongCommandError(f"accelerate {' '.join(words[:1])}: only launch is checked")
    launched = _parse(launch_command_parser(), words[1:], "accelerate launch")
    script, rest = launched.training_script, launched.training_script_args
    if launched.module:
        _python(["-m", script, *rest], own_files)
    elif launched.no_python:
        check([script, *rest], own_files)
    else:
        _python([script, *rest], own_files)


def _python(words: list[str], own_files: set[str]) -> None:
    if words[:1] == ["-m"]:
        module, rest = words[1], words[2:]
        if module in ("lm_eval", "lm_eval_lora_ensemble"):
            _lm_eval(rest, own_files)
        elif module == "lm_eval_lora_ensemble.cli":
            _lora_ensemble(rest, own_files)
        elif importlib.util.find_spec(module) is None:
            raise WrongCommandError(f"there is no module {module}")
        return
    script = words[0] if words else ""
    if script != "-c" and script not in own_files and not (PROJECT / script).is_file():
        raise WrongCommandError(f"python {script}: there is no such file in the checkout or on the page")


def _slurm(words: list[str], own_files: set[str]) -> None:
    rest = words
    while rest and rest[0].startswith("-"):
        rest = rest[1:]
    if not rest:
        raise WrongCommandError("srun without a command")
    check(rest, own_files)


def _sbatch(words: list[str], own_files: set[str]) -> None:
    if words[-1] not in own_files:
        raise WrongCommandError(f"sbatch {words[-1]}: the page does not hold it")


def _make(words: list[str], own_files: set[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    if missing := [word for word in words if word not in targets]:
        raise WrongCommandError(f"the Makefile has no target {', '.join(missing)}")


def _anything(words: list[str], own_files: set[str]) -> None:
    """Take what other people's programs say; they have no parser that could be asked here."""


_OTHERS = (
    "cd",
    "export",
    "git",
    "hf",
    "mkdir",
    "pip",
    "pip-audit",
    "pre-commit",
    "source",
    "tar",
    "torchrun",
    "wandb",
)
_CHECKS: dict[str, Callable[[list[str], set[str]], None]] = {
    "accelerate": _accelerate,
    "lm_eval": _lm_eval,
    "lora-ensemble": _lora_ensemble,
    "make": _make,
    "python": _python,
    "python3": _python,
    "sbatch": _sbatch,
    "srun": _slurm,
    **dict.fromkeys(_OTHERS, _anything),
    **{path.name: _anything for path in (PROJECT / "docs").rglob("*.sh")},
}
