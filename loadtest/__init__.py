"""Synthetic traffic against a cluster: arrivals, workloads, expert skew, faults and the report."""
