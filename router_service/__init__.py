"""The router: the trunk and the gate, and the dispatch of token rows to expert replicas."""
