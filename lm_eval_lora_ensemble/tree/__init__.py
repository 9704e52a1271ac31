"""Token requests as a tree: each distinct position once; one mask, predicate and trial for scoring and training."""
