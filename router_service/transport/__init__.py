"""How batches reach replicas: a seam of two methods, with an in-process and a gRPC implementation."""
