"""The message store: `base` holds the port and its promises, the other modules keep them."""
