"""Sizes that steer the engine, by device and dtype. No score depends on them; a test sets them to absurd values.

Measured with ``benchmarks/scoring.py`` on the processors that docs/performance.md names.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from lm_eval_lora_ensemble.tree.segments import Sizes


@dataclass(frozen=True)
class Tuning:
    """How much is done at a time.

    Attributes:
        tokens: of a pass with ``batch_size=auto``. A few hundred keep a matrix product busy; more only save passes and
            fill memory, and on a CPU push the element-wise parts out of its cache.
        masked_tokens: of a pass whose attention is one masked square, which grows with its square.
        logits: elements of the block of logits that exists at a time.
        sizes: of attention's pieces.
    """

    tokens: int
    masked_tokens: int
    logits: int
    sizes: Sizes

    def as_mapping(self) -> dict[str, Any]:
        """Return it as JSON, for a results file."""
        return {**asdict(self), "sizes": self.sizes._asdict()}


_CPU = Tuning(tokens=1024, masked_tokens=512, logits=1 << 25, sizes=Sizes())
# few and large kernels: launching one costs more than many tokens; a block bounds the float32 scores [heads, block, L],
# which a long context would make too large
_ACCELERATOR = Tuning(
    tokens=16384,
    masked_tokens=2048,
    logits=1 << 27,
    sizes=Sizes(square=512, whole=1024, block=2048, carried=256),
)


def tuning_for(device: torch.device) -> Tuning:
    """Return the sizes for a device."""
    return _CPU if device.type == "cpu" else _ACCELERATOR
