"""Benchmarks of a running system: `python -m benchmarks NAME --json FILE`."""
