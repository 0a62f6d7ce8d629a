"""How many replicas each group should have: policy as pure functions, and its adapter to Ray Serve."""
