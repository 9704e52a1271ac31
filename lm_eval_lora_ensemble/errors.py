"""The one exception a user is meant to read, and how it and Ctrl-C are shown: one line, no traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from types import TracebackType

EXIT_CODE = 2


class EnsembleError(ValueError):
    """Something the user can mend. The message names the thing, the place and the way out."""


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
