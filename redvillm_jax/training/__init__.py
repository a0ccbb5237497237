"""Rows, optimizer, train step and checkpoints of a run; must not import inference."""
