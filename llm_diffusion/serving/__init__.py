"""Trained models for others: an OpenAI-compatible endpoint, a page to play with, and what other engines load."""
