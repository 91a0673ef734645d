"""Comparison of results side by side on one HTML page."""
