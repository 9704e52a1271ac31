"""Evaluate every epoch of an ensemble with the base model loaded once."""
