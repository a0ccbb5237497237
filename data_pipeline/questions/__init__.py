"""Reads questions in the formats that people publish them in."""
