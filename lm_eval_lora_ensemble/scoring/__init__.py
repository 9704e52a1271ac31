"""Scoring requests with every member; knows no task."""
