"""What several chapters need: validation of arguments, random states, the param store, traces."""
