"""The cards of an ensemble and its members: README.md files as the Hugging Face Hub reads them."""
