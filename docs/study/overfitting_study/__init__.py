"""The study of docs/study.md: what is run, and which of the paper's claims its results bear out."""
