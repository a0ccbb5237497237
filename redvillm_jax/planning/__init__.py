"""Memory and time of a step on a TPU slice, by compiling it for the slice; runs nothing."""
