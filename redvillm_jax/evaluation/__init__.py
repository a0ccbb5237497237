"""What answers are worth: scores by rule, verdicts of a judge, intervals. Imports no jax."""
