"""Reports from files of results alone."""
