"""What commands that score with an ensemble take as lm-eval's own does."""

from __future__ import annotations

import argparse
from typing import Any

DEVICE = "cuda:0"
"""The default of lm-eval's own command, which takes the CPU without such a device; HFLM's, "cuda", does not."""


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add lm-eval's options of the model and of its tasks."""
    parser.add_argument("--num_fewshot", type=int, help="examples in the context (default: the task's own)")
    parser.add_argument("--model_args", default="", metavar="K=V,…", help="further arguments, as lm_eval's")
    parser.add_argument("--batch_size", default="auto", help="as lm_eval's (default: auto)")
    parser.add_argument(
        "--device", default=DEVICE, help="as lm_eval's (default: %(default)s if there is one)"
    )
    parser.add_argument("--include_path", help="a folder of further task YAMLs")


def parse_model_args(text: str) -> dict[str, Any]:
    """Read ``K=V,…`` as lm-eval does."""
    from lm_eval.utils import simple_parse_args_string

    return dict(simple_parse_args_string(text)) if text else {}
