"""Pure functions between the model and the network: (token, expert) pairs to batches per replica, and back."""
