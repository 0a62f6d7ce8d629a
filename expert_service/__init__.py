"""An expert group: a Ray Serve application whose replicas own a gRPC server each."""
