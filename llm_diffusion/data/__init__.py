"""Datasets by name, corpora tokenised once, and the embedded model's tasks."""
