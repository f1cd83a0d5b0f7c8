"""Ordered topics between nodes, dispatchers and the api: the port (base), its records, its backends."""
