"""fastim: an instant-messaging backend in which nothing accepted is lost.

docs/design.md tells how it is built, docs/guarantees.md what it promises and what it does not.
"""

__version__ = "0.1.0"
