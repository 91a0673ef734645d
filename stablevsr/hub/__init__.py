"""Weights by name: published models from the Hugging Face hub, converted once and kept in the user's cache."""
