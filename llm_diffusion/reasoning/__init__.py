"""Worked answers and problems, checked by evaluation; preference pairs by injected errors; a judge."""
