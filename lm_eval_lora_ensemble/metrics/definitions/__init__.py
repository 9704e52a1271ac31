"""The package's own metrics, a family a file, one function each.

Every module here is imported when the registry is first read, in alphabetical order, which is the order of all tables.
"""
