"""A step captured as a graph and compiled."""
