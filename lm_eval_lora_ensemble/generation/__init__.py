"""Text from an ensemble: decoding from the mixture of its members, and how sure it is of what it says."""
