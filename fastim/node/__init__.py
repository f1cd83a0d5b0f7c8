"""The access node: sockets, sessions, delivery and catch-up."""
