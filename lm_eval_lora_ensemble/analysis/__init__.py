"""lm-eval's saved runs as arrays, and what is computed from them: evaluation, comparison, the verb ``analyse``."""
