"""Decoding: from masks to text."""
