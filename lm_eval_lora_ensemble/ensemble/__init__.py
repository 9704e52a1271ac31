"""An ensemble on disk: its manifest and members, each adapter checked as data, and how they come onto a base model."""
