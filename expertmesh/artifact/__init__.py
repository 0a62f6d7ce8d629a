"""A prepared model on disk: manifest, trunk and experts."""
