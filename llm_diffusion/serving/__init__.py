"""Beyond this process: what other engines load, and answers over a network."""
