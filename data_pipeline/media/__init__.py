"""Reads videos and pictures, and writes letters on them; knows no questions and no model."""
