"""What a step on a TPU slice takes, by compiling it there; runs nothing."""
