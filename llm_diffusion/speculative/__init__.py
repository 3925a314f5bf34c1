"""Lossless decoding: the adapter drafts, the base verifies."""
