"""The one exception a user is meant to read, and how it and Ctrl-C are shown: one line, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

EXIT_CODE = 2


class EnsembleError(ValueError):
    """Something the user can mend. The message names the thing, the place and the way out."""


def one_line(text: object) -> str:
    """Fold ``text`` to one line with control characters escaped: a name may come from a stranger's file."""
    folded = " ".join(str(text).split())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in folded)


class Interruption:
    """What to say after Ctrl-C: what was saved, asked of whoever saves at that moment."""

    says: Callable[[], str] = staticmethod(lambda: "nothing was saved")

    @classmethod
    def line(cls) -> str:
        """Return the one line that answers Ctrl-C."""
        return f"lora-ensemble: stopped; {one_line(cls.says())}"


def install_excepthook() -> None:
    """Show an uncaught :class:`EnsembleError` or Ctrl-C as one line, also under ``lm_eval``'s own command line.

    Python exits with status 1 after any excepthook, and dies of SIGINT after Ctrl-C, which a shell calls status
    130. Every other exception goes to the hook that was there.
    """
    previous = sys.excepthook
    if getattr(previous, "shows_ensemble_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, EnsembleError):
            print(f"lora-ensemble: error: {one_line(error)}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print(Interruption.line(), file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook.shows_ensemble_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook
