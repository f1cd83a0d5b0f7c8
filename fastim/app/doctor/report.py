"""What the doctor says of one thing, and how long he waits for an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from fastim.config import shown
from fastim.errors import FastimError

DEADLINE_S: Final = 10.0
"""For all questions to one server."""
MOST_SKEW_MS: Final = 1_000
"""Ends of leases, claims and deadlines are compared across machines."""


class Finding(msgspec.Struct, frozen=True):
    """One line. text: what was found and, when bad, what to do."""

    good: bool
    subject: str
    text: str


def skew(subject: str, server_ms: float, asked_ms: float, answered_ms: float) -> Finding:
    """The server's clock beside ours: it said server_ms somewhere between asking and answering."""
    ahead_ms = server_ms - (asked_ms + answered_ms) / 2
    slack_ms = (answered_ms - asked_ms) / 2
    text = f"its clock is {abs(ahead_ms):,.0f} ms {'ahead' if ahead_ms > 0 else 'behind'}"
    if abs(ahead_ms) - slack_ms > MOST_SKEW_MS:
        return Finding(False, subject, f"{text}; at most {MOST_SKEW_MS:,}: let both follow NTP")
    return Finding(True, subject, text)


async def bounded(subject: str, url: str, findings: AsyncIterator[Finding]) -> AsyncIterator[Finding]:
    """The findings, and one bad one in place of an error or of silence."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DEADLINE_S
    try:
        while True:
            async with asyncio.timeout_at(deadline):
                try:
                    finding = await anext(findings)
                except StopAsyncIteration:
                    return
            yield finding
    except TimeoutError:
        yield Finding(False, subject, f"{shown(url)} did not answer within {DEADLINE_S:.0f} s")
    except FastimError as error:
        yield Finding(False, subject, f"{shown(url)}: {error}")
    except Exception as error:
        # Of a driver: there is no end to their kinds, and its first line says what is wrong.
        text = (str(error) or type(error).__name__).splitlines()[0]
        yield Finding(False, subject, f"{shown(url)} does not answer: {text}")
