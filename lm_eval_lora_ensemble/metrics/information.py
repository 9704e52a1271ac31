"""How uncertain the ensemble is, and how much of that its members disagree about.

Every function takes probabilities and returns one value a document; entropies are in nats. Choices that a
document lacks have probability 0 and add nothing (0 log 0 = 0).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray, as_probabilities, first_index

MUTUAL_INFORMATION_TOLERANCE = 1e-9
"""Rounding leaves about 1e-15 nats; anything below minus this is a mistake, and is not hidden."""


def entropy(p: npt.ArrayLike) -> FloatArray:
    """Return Shannon's entropy ``H[p] = −Σ_c p(c) log p(c)``.

    Args:
        p: (..., C) probabilities.

    Returns:
        (...,), nats, in [0, ln C].

    Raises:
        EnsembleError: not probabilities.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.entropy([[0.5, 0.5], [1.0, 0.0]]).round(3).tolist()  # ln 2, 0
        [0.693, 0.0]
    """
    total: FloatArray = special.entr(np.minimum(as_probabilities(p), 1.0)).sum(axis=-1)
    return total


def predictive_entropy(p: npt.ArrayLike) -> FloatArray:
    """Return the entropy of the ensemble, ``H[p̄]`` with ``p̄ = (1/N) Σ_m p_m``: the total uncertainty.

    Args:
        p: (N, D, C) members' probabilities.

    Returns:
        (D,), nats, in [0, ln C].

    Raises:
        EnsembleError: not probabilities.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> members = [[[1.0, 0.0]], [[0.0, 1.0]]]  # both certain, of different choices
        >>> round(float(metrics.predictive_entropy(members)[0]), 3)  # ln 2
        0.693
    """
    return entropy(as_probabilities(p, ndim=3).mean(axis=0))


def expected_entropy(p: npt.ArrayLike) -> FloatArray:
    """Return the members' mean entropy, ``(1/N) Σ_m H[p_m]``: the uncertainty they agree on (aleatoric).

    Args:
        p: (N, D, C) members' probabilities.

    Returns:
        (D,), nats, in [0, ln C].

    Raises:
        EnsembleError: not probabilities.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> members = [[[1.0, 0.0]], [[0.5, 0.5]]]
        >>> round(float(metrics.expected_entropy(members)[0]), 3)  # ½ ln 2
        0.347
    """
    mean: FloatArray = entropy(as_probabilities(p, ndim=3)).mean(axis=0)
    return mean


def mutual_information(p: npt.ArrayLike) -> FloatArray:
    """Return ``I = H[p̄] − (1/N) Σ_m H[p_m]``: what knowing the member would tell (epistemic).

    The difference of predictive and expected entropy (Houlsby et al. 2011; Gal et al. 2017; used for LoRA
    ensembles in arXiv 2402.12264), equal to the mean Kullback–Leibler divergence of the members from p̄.
    Rounding can leave −1e-16; the value is returned as it is.

    Args:
        p: (N, D, C) members' probabilities.

    Returns:
        (D,), nats, in [0, min(ln N, H[p̄])] up to rounding; 0 for one member or equal members.

    Raises:
        EnsembleError: not probabilities, or a value below −1e-9, which by Jensen's inequality only a
            mistake in the computation can give.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> members = [[[1.0, 0.0]], [[0.0, 1.0]]]  # both certain, of different choices
        >>> round(float(metrics.mutual_information(members)[0]), 3)  # ln 2
        0.693
        >>> float(metrics.mutual_information([[[0.5, 0.5]], [[0.5, 0.5]]])[0])
        0.0
    """
    information = predictive_entropy(p) - expected_entropy(p)
    if (information < -MUTUAL_INFORMATION_TOLERANCE).any():
        (document,) = first_index(information < -MUTUAL_INFORMATION_TOLERANCE)
        raise EnsembleError(
            f"mutual information is {information[document]:.3g} nats at document {document}; "
            "it cannot be negative, so the members' probabilities are inconsistent"
        )
    return information
