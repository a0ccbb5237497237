"""A base and a video representation as one model, their folder and their settings; must not import training."""
