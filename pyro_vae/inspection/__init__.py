"""All diagnostics of a fitted pair at once, and their page."""
