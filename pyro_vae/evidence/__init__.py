"""Estimates of log p(x) where there is no exact answer."""
