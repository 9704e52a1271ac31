"""The quickstart: a real model, real questions, a real ensemble."""
