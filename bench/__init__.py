"""Measurements of the real server. `python -m bench --help`; results/README.md says how to read them."""
