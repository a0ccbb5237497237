"""Asks chat models, and finds what is suspicious in what they write."""
