"""Array types, and the checks that every metric makes of what it is given.

Throughout this package N is the number of members, D of documents, C of choices and R of bootstrap
resamples. A ragged task (ARC has 3 to 5 choices) is one dense array of width C: the choices a document
lacks come last, with loglikelihood −inf and so with probability exactly 0.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.errors import EnsembleError

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
StringArray: TypeAlias = npt.NDArray[np.str_]

SUM_TOLERANCE = 1e-6
"""How far a document's probabilities may sum from 1: float32 softmax over a few choices stays within."""


def as_float(values: npt.ArrayLike, name: str, ndim: int | None = None) -> FloatArray:
    """Return ``values`` as float64.

    Raises:
        EnsembleError: not numeric, ragged, masked, not of ``ndim`` dimensions, or without a document.
    """
    if np.ma.is_masked(values):
        raise EnsembleError(f"{name} has masked entries, which would count; take them out first")
    try:
        given = np.asarray(values)
        if given.dtype.kind not in "biufO":
            raise TypeError(f"its type is {given.dtype}")
        array = given.astype(np.float64, copy=False)
    except (TypeError, ValueError, RuntimeError) as error:
        hint = "; a tensor: .detach().float() first" if hasattr(values, "requires_grad") else ""
        raise EnsembleError(f"{name} is not a rectangular array of numbers ({error}){hint}") from error
    if ndim is not None and array.ndim != ndim:
        raise EnsembleError(f"{name} has shape {array.shape}; {ndim} dimensions are needed")
    if array.size == 0:
        raise EnsembleError(f"{name} is empty (shape {array.shape}); there is no document to measure")
    return array


def as_probabilities(p: npt.ArrayLike, name: str = "p", ndim: int | None = None) -> FloatArray:
    """Return ``p`` as float64 after checking that its last axis holds probabilities.

    Raises:
        EnsembleError: a NaN, a value outside [0, 1], a sum off 1 by more than 1e-6, or fewer than two
            choices, for which every metric would be trivially perfect.
    """
    array = as_float(p, name, ndim)
    if array.ndim == 0 or array.shape[-1] < 2:
        raise EnsembleError(
            f"{name} has shape {array.shape}; at least two choices are needed on the last axis"
        )
    if np.isnan(array).any():
        raise EnsembleError(f"{name} has a NaN at index {first_index(np.isnan(array))}")
    outside = (array < 0) | (array > 1 + SUM_TOLERANCE)
    if outside.any():
        index = first_index(outside)
        raise EnsembleError(f"{name} has {array[index]:g} at index {index}; probabilities lie in [0, 1]")
    total = array.sum(axis=-1)
    wrong = np.abs(total - 1) > SUM_TOLERANCE
    if wrong.any():
        index = first_index(wrong)
        raise EnsembleError(
            f"{name} sums to {total[index]:.9g} at index {index}, not to 1; "
            "normalise it with choice_probabilities"
        )
    return array


def as_counts(counts: npt.ArrayLike | None, documents: int, width: int, *, least: int = 2) -> IntArray:
    """Return how many choices each document has, (D,); ``width`` everywhere for None.

    Raises:
        EnsembleError: another shape, no whole numbers, or one below ``least`` or above ``width``.
    """
    if counts is None:
        return np.full(documents, width, dtype=np.int64)
    array = np.asarray(counts)
    if array.shape != (documents,) or not np.issubdtype(array.dtype, np.integer):
        raise EnsembleError(
            f"counts has shape {array.shape} and type {array.dtype}; "
            f"one whole number for each of {documents} documents is needed"
        )
    outside = (array < least) | (array > width)
    if outside.any():
        index = int(np.argmax(outside))
        raise EnsembleError(
            f"counts is {array[index]} at document {index}; it lies between {least} and {width}"
        )
    return array.astype(np.int64, copy=False)


def as_is_gold(gold: npt.ArrayLike, counts: npt.ArrayLike, width: int) -> BoolArray:
    """Return which choices are right after checking them.

    Args:
        gold: (D,) index of each document's right choice, or (D, C) booleans, several of which may be true.
        counts: (D,) how many choices each document has.
        width: C, columns of the result.

    Returns:
        (D, C), true for at least one choice of every document.

    Raises:
        EnsembleError: another shape or type, a gold outside its document's choices, or a document without one.
    """
    array, sizes = np.asarray(gold), np.asarray(counts)
    d = len(sizes)
    if array.shape == (d,) and np.issubdtype(array.dtype, np.integer):
        outside = (array < 0) | (array >= sizes)
        if outside.any():
            index = int(np.argmax(outside))
            raise EnsembleError(
                f"gold is {array[index]} at document {index}, which has choices 0 to {sizes[index] - 1}"
            )
        is_gold = np.zeros((d, width), dtype=np.bool_)
        is_gold[np.arange(d), array] = True
        return is_gold
    if array.ndim != 2 or array.dtype != np.bool_:
        raise EnsembleError(
            f"gold has shape {array.shape} and type {array.dtype}; one index for each of {d} documents is needed, "
            "or (documents, choices) booleans"
        )
    if len(array) != d or array.shape[1] > width:
        raise EnsembleError(f"gold has shape {array.shape}; ({d}, {width}) is needed")
    is_gold = np.pad(array, ((0, 0), (0, width - array.shape[1])))
    outside = np.asarray((is_gold & (np.arange(width) >= sizes[:, None])).any(axis=1))
    for wrong, what in ((outside, "a gold outside its choices"), (~is_gold.any(axis=1), "no gold choice")):
        if wrong.any():
            raise EnsembleError(f"document {int(np.argmax(wrong))} has {what}")
    return is_gold


def as_binary(values: npt.ArrayLike, name: str, documents: int) -> BoolArray:
    """Return (D,) values that are all 0 or 1 as booleans.

    Raises:
        EnsembleError: another shape or another value.
    """
    array = np.asarray(values)
    if array.shape != (documents,):
        raise EnsembleError(f"{name} has shape {array.shape}; ({documents},) is needed")
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise EnsembleError(f"{name} must hold 0 and 1 only")
    return array.astype(np.bool_, copy=False)


def first_index(where: npt.NDArray[Any]) -> tuple[int, ...]:
    """Return the index of the first true value."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(where)), where.shape))
