"""What the router service and the expert service share, and the command line."""

__version__ = "0.1.0"
