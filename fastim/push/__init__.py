"""Vendor push: the port (base) and its vendors."""
