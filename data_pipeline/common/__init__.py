"""Files, errors, locks and processes, for every package of the project; imports nothing of the project."""
