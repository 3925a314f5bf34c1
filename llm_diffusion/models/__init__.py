"""A causal LM made a diffusion model: loading, opened attention, forward, record, special tokens, copies for a CPU."""
