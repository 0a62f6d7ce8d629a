"""The demo model: a small mixture-of-experts language model, its corpus, its training and its evaluation."""
