"""Neural network layers that several bases share, and the tables of their published configs; must name no base."""
