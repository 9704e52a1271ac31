"""The pooled MMLU sets of the paper (arXiv 2402.12264), which lm-eval has only subject by subject."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def mmlu(*, subjects: Sequence[str], **_: Any) -> dict[str, Dataset]:
    """Pool MMLU subjects as the paper does: train on dev and validation, evaluate on test.

    The ``custom_dataset`` of an lm-eval task, which calls it with the task's ``metadata`` and
    ``dataset_kwargs``; only ``subjects`` is read.

    Args:
        subjects: names of MMLU subjects, in the order in which they are pooled.

    Returns:
        The splits ``train`` and ``test``: the columns of cais/mmlu, with each row's subject in ``subject``.
    """
    from datasets import concatenate_datasets, load_dataset

    train, test = [], []
    for subject in subjects:
        dev, validation, evaluation = (
            _with_subject(split, subject)
            for split in load_dataset("cais/mmlu", subject, split=["dev", "validation", "test"])
        )
        train += [dev, validation]
        test.append(evaluation)
    return {"train": concatenate_datasets(train), "test": concatenate_datasets(test)}


def _with_subject(rows: Dataset, subject: str) -> Dataset:
    """Return ``rows`` with the column ``subject``, which copies of the data set may lack or leave empty."""
    if "subject" in rows.column_names:
        rows = rows.remove_columns("subject")
    return rows.add_column("subject", [subject] * len(rows))
