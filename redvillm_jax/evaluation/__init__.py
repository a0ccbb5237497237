"""Scores answers, by rule or by a judge; knows no JAX."""
