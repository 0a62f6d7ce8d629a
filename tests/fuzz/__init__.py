"""Fuzzers of what comes from outside: `make fuzz`."""
