"""Results side by side on one HTML page."""
