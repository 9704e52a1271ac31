"""The study of docs/posteriors.md: what is run, how it goes on, and how its tables follow from the results."""
