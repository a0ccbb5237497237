"""Neural network layers that several bases share, and how their published configs are read; names no base."""
