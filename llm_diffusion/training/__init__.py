"""Trainers on TRL's: mask-and-denoise fine-tuning, Diffusion-DPO, distillation, stages."""
