"""The paper's tasks (arXiv 2402.12264), and the data set that two of them pool."""
