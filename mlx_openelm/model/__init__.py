"""The network, its weights and its cache."""
