"""Draws for ArviZ."""
