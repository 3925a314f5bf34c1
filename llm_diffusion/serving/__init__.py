"""A converted model for others to use: an endpoint, and a page to play with."""
