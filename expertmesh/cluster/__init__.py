"""Clusters that the command line starts, asks and stops."""
