"""Asks chat models, and finds suspicious passages in their translations; knows no videos and no files of questions."""
