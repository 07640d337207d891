"""Pyro programs of many kinds, written as their users write them, and what the package does with each of them."""
