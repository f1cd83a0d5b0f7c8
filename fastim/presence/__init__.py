"""Who is attached where, right now: the port (base) and its backends."""
