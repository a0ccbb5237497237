"""Devices, processes, the command line and log files; must not import models."""
