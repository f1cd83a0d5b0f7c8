"""REST: the way in for callers that hold no connection. Publishes to submit, reads the store."""
