"""Exports of draws for ArviZ."""
