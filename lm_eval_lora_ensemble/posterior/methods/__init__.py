"""The package's own methods, one a file."""
