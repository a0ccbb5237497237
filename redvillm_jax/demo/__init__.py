"""The demo: generated videos, tiny bases and their pre-training; no other room imports it."""
