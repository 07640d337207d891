"""Helpers of several chapters: validation of arguments, random states, the param store, traces."""
