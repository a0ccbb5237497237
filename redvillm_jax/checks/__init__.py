"""The checks of the command selfcheck: of a machine and of a model on it; no other room imports them."""
