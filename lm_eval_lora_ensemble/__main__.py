"""``python -m lm_eval_lora_ensemble``: lm-eval's own command line with the plugin loaded.

For environments that run no start-up files, or where ``LM_EVAL_LORA_ENSEMBLE_AUTOLOAD=0`` is set.
"""

from __future__ import annotations

from lm_eval_lora_ensemble._autoload import install


def main() -> None:
    """Load the plugin whatever the environment says, then hand over to ``lm_eval``."""
    install(even_if_disabled=True)
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
