"""The one exception a user is meant to read, and how it is shown: one line, no traceback."""

from __future__ import annotations

import sys
from types import TracebackType

EXIT_CODE = 2


class EnsembleError(ValueError):
    """Something the user can mend. The message names the thing, the place and the way out."""


def one_line(text: object) -> str:
    """Fold ``text`` to one line with control characters escaped: a name may come from a stranger's file."""
    folded = " ".join(str(text).split())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in folded)


def install_excepthook() -> None:
    """Show an uncaught :class:`EnsembleError` as one line, also under ``lm_eval``'s own command line.

    Python exits with status 1 after any excepthook. Every other exception goes to the hook that was there.
    """
    previous = sys.excepthook
    if getattr(previous, "shows_ensemble_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, EnsembleError):
            print(f"lora-ensemble: error: {one_line(error)}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook.shows_ensemble_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook
