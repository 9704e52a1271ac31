"""Train the members of an ensemble: ``python train/train_members.py RECIPE.yaml key=value …``.

The same as ``lora-ensemble train RECIPE.yaml key=value …``.
"""

from __future__ import annotations

import sys

from lm_eval_lora_ensemble.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
