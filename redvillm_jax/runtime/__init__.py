"""Devices, processes, the command line and log files; knows nothing of models."""
