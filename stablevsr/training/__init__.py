"""Clips to learn from, losses as pure functions, and the loop."""
