"""The checks of the command selfcheck, on a machine and on a model; only selfcheck imports them."""
