"""The converted folder: its format, its integrity, and the digest cache."""
