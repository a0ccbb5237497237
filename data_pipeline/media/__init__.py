"""Reads videos and pictures, and writes letters on them."""
