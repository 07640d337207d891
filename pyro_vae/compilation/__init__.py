"""Capture of functions as graphs of operations, their compilation, and an Adam for captured steps."""
