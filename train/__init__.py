"""Training of ensemble members and its recipes; installed as ``lm_eval_lora_ensemble.train``."""
