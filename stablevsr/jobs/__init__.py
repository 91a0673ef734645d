"""File-to-file work."""
