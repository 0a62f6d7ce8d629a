"""Who serves what, now: the directory service and its client."""
