"""The one exception a user is meant to read, and how it and Ctrl-C are shown: one line, no traceback.

Only a command shortens errors. Nothing is installed when a module is imported, and in a notebook or a program of
somebody else's every error keeps its traceback.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import PurePath
from types import TracebackType

EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130

_COMMANDS = {"lm_eval", "lm-eval", "lora-ensemble"}
_MODULES = {"lm_eval", "lm_eval_lora_ensemble"}


class EnsembleError(ValueError):
    """Something the user can mend. The message names the thing, the place and the way out."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, whose text says what was saved until then and how to go on."""


def one_line(text: object) -> str:
    """Fold ``text`` to one line with control characters escaped: a name may come from a stranger's file."""
    folded = " ".join(str(text).split())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in folded)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that was probably meant, or None if nothing is near.

    Args:
        name: what was written.
        known: the names there are.
        cutoff: how alike they must be, from 0 (whatever is nearest) to 1 (equal).
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return close[0] if close else None


def error_line(error: EnsembleError) -> str:
    """Return what a command prints of an error."""
    return f"lora-ensemble: error: {one_line(error)}"


def interruption_line(saved: object) -> str:
    """Return what a command prints after Ctrl-C; ``saved`` says what was saved, empty for nothing."""
    return f"lora-ensemble: stopped; {one_line(saved) or 'nothing was saved'}"


class OneLineHook:
    """A ``sys.excepthook`` that shows our errors and Ctrl-C as one line; every other goes to the hook before it.

    Python exits with status 1 after any excepthook, and dies of SIGINT after Ctrl-C, which a shell calls status 130.

    Args:
        previous: the hook that was there.
        saved: says what of the run is saved at the moment of the Ctrl-C.
    """

    def __init__(
        self,
        previous: Callable[[type[BaseException], BaseException, TracebackType | None], object],
        saved: Callable[[], str],
    ) -> None:
        self.previous = previous
        self.saved = saved

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Show one uncaught exception."""
        if isinstance(error, EnsembleError):
            print(error_line(error), file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print(interruption_line(str(error) or self.saved()), file=sys.stderr)
        else:
            self.previous(kind, error, trace)


def shorten_errors_of_command(saved: Callable[[], str]) -> None:
    """Install :class:`OneLineHook` if this process is lm-eval's command or ours; else do nothing.

    Args:
        saved: says what of the run is saved; that of the latest caller counts.
    """
    if not _is_command():
        return
    hook = sys.excepthook
    if isinstance(hook, OneLineHook):
        hook.saved = saved
    else:
        sys.excepthook = OneLineHook(hook, saved)


def _is_command() -> bool:
    """Whether the process was started as ``lm_eval``, ``lora-ensemble`` or ``python -m`` one of their packages."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name).removesuffix(".__main__") in _MODULES
    return PurePath(getattr(main, "__file__", None) or "").stem in _COMMANDS
