"""A study in steps: each is run once, and what they wrote becomes the tables of a page."""
