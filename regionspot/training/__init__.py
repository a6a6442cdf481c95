"""Training the head: see `loop.train`."""
