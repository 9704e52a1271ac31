"""The five-minute demonstration: a real model, real questions, a real ensemble."""
