"""Conversion of published checkpoints to our weights file, and back."""
