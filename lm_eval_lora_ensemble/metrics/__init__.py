"""Uncertainty metrics: pure functions of arrays that know neither model nor task."""
