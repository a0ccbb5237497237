"""A base and a video representation as one model, with its folder and its settings; knows nothing of training."""
