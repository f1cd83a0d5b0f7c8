"""The compiled core: knows bytes, time and slots; no asyncio, no logging.

frame   the hot half of the wire codec
wheel   who has been silent for too long
acks    what was sent and is not acknowledged
cipher  AES-256-GCM with counter nonces
sealed  a connection's packets in their seals
conn    a connection on picows: where the others meet, and hot operations end
fanout  one message to many connections, written without the GIL

Every module has DEBUG (built with checks and counters) and live() (what is allocated now; all zero unless
DEBUG).
"""
