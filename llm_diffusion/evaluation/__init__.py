"""Measuring: likelihood, answers, tasks of lm-evaluation-harness, speed, and one report of everything."""
