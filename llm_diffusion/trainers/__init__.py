"""Trainers: TRL's own, with the masked-diffusion objective in place of next-token prediction."""
