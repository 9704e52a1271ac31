"""lm-eval task YAMLs; installed as ``lm_eval_lora_ensemble.tasks``."""
