"""Reads question files and evaluation sets in their published formats; knows no videos and no model."""
