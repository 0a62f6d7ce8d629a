"""What `uniform` shares within Ray Serve's controller."""

wanted: dict[str, int] = {}
"""Group -> replicas that its own load asks for."""
