"""Rows, optimizer, train step and checkpoints of a run; knows nothing of answering."""
