"""`fastim chat`: a person at a terminal, or a script at a pipe, as one device of one user.

Line by line, on the public SDK: what is typed is sent to the open conversation, what begins with / is a
command. A line that is shown in the open conversation counts as read. Whatever others wrote is stripped of
control characters before it reaches the terminal.

    ✓ stored by the server for good      ✓✓ read by somebody else in the conversation
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import readline
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import uvloop

from fastim import observe
from fastim.cli.tokens import token_for
from fastim.cli.where import socket_url
from fastim.client import (
    Client,
    Connected,
    Conversation,
    Delivery,
    Disconnected,
    Event,
    MemoryLocalStore,
    Message,
    ReadMark,
    SealKey,
    SqliteLocalStore,
    StateChanged,
)
from fastim.config import Config
from fastim.errors import FastimError, PeerError, Unavailable, UsageError
from fastim.model import check_id, pair_conv, parse_conv

HELP: Final = """\
  /list             conversations, with what is new in them
  /open USER|CONV   show a conversation and talk there
  /history [N]      the last N messages of it
  /read [USER|CONV] mark it as read
  /quit             leave
  anything else     is sent to the open conversation"""
PAGE: Final = 20
CONNECT_S: Final = 10.0
DRAIN_S: Final = 10.0
LIST_S: Final = 0.2
"""The list comes right behind the greeting; nothing says when it is whole."""
_LEAVE: Final = ("/quit", "/q", "/exit")
_BOLD, _DIM, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def run_chat(
    config: Config,
    user: str,
    *,
    to: str,
    token: str,
    url: str,
    ca: Path | None,
    seal: str,
    device: str,
    store: Path | None,
) -> int:
    """Talk until /quit or the end of the input; the exit code."""
    try:
        check_id("user", user)
        check_id("device", device)
    except PeerError as error:
        raise UsageError(error.detail) from None
    observe.set_up_logging("ERROR")
    bearer = token_for(config, token, user, "client")
    address = socket_url(config, url)
    if ca is None and address.startswith("wss:"):
        made = config.data_path / "dev-tls-cert.pem"
        ca = made if made.exists() else None
    if store is None and not token:
        # Beside the development server's own data: both go together when they are removed.
        store = config.data_path / f"chat-{user}.{device}.db"
    try:
        client = Client(
            address, bearer, device, store=SqliteLocalStore(store) if store else MemoryLocalStore(),
            device_class="desktop", ssl=str(ca) if ca else None,
            seal=SealKey.from_text(seal) if seal else None,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"{ca}: {error.strerror or error}") from None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Chat(client, user, address).run(to))


def clean(text: str) -> str:
    """Text of others without anything that a terminal would obey."""
    return "".join(char if char.isprintable() else " " if char in "\t\n\r" else "\ufffd" for char in text)


class Terminal:
    """Lines in, lines out. What is printed while somebody types does not tear his line apart."""

    def __init__(self) -> None:
        self.is_tty = sys.stdin.isatty() and sys.stdout.isatty()
        self._modes = termios.tcgetattr(0) if self.is_tty else None
        self._prompt = "> " if self.is_tty else ""
        self._typing = False

    def say(self, text: str = "", style: str = "") -> None:
        if not self.is_tty:
            print(text, flush=True)
            return
        line = f"{style}{text}{_PLAIN}" if style else text
        if self._typing:
            print(f"\r\x1b[K{line}\n{self._prompt}{readline.get_line_buffer()}", end="", flush=True)
        else:
            print(line, flush=True)

    def restore(self) -> None:
        """Whoever was still typing leaves the terminal as readline had set it."""
        if self._modes is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, self._modes)
            if self._typing:
                print(flush=True)

    def read_into(self, put: Callable[[str | None], None]) -> None:
        """Read in a thread of its own, which does not hold up the end of the program; None at the end."""
        lines = self._typed() if self.is_tty else _piped()
        threading.Thread(target=_pass_on, args=(lines, put), name="chat.stdin", daemon=True).start()

    def _typed(self) -> Iterator[str]:
        while True:
            self._typing = True
            try:
                yield input(self._prompt)
            except EOFError:
                return
            finally:
                self._typing = False


def _piped() -> Iterator[str]:
    """Not sys.stdin: a thread that waits in it holds its lock, on which the end of the program would hang."""
    rest = b""
    while part := os.read(0, 65_536):
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")


def _pass_on(lines: Iterator[str], put: Callable[[str | None], None]) -> None:
    with contextlib.suppress(RuntimeError, OSError):  # the loop has ended, or the input was closed
        for line in lines:
            put(line.strip())
            if line.strip() in _LEAVE:
                return
        put(None)


class Chat:
    """The conversation between the person, the SDK and the terminal."""

    def __init__(self, client: Client, user: str, address: str) -> None:
        self._client = client
        self._user = user
        self._address = address
        self._terminal = Terminal()
        self._conv = ""
        self._sending: dict[bytes, str] = {}
        self._failure = ""
        self._answered = asyncio.Event()
        """Let in, or refused for good."""
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()

    async def run(self, to: str) -> int:
        await self._client.start()
        watching = asyncio.create_task(self._watch(), name="chat.events")
        try:
            await self._connect()
            self._list()
            if to:
                await self._command(f"/open {to}")
            elif self._terminal.is_tty:
                self._terminal.say(HELP, _DIM)
            loop = asyncio.get_running_loop()
            self._terminal.read_into(lambda line: _hand(loop, self._lines, line))
            await self._obey(watching)
        except (KeyboardInterrupt, asyncio.CancelledError):
            pass
        finally:
            await self._client.close(drain_s=0.0 if self._failure else DRAIN_S)
            await asyncio.gather(watching, return_exceptions=True)
            self._terminal.restore()
        left = [one for one in self._sending.values() if one]
        if left and not self._failure:
            self._terminal.say(f"{len(left)} not sent yet; they are kept for the next time")
        if self._failure:
            raise Unavailable(self._address, self._failure)
        return 0

    async def _connect(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                await self._answered.wait()
        if self._client.connected:
            await asyncio.sleep(LIST_S)

    async def _obey(self, watching: asyncio.Task[None]) -> None:
        """Until /quit, the end of the input, or a server that does not let us in."""
        while not self._failure:
            reading = asyncio.ensure_future(self._lines.get())
            await asyncio.wait({reading, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                reading.cancel()
                return
            line = reading.result()
            if line is None or line in _LEAVE:
                return
            try:
                await self._command(line)
            except (FastimError, ValueError) as error:
                detail = error.detail if isinstance(error, PeerError | Unavailable) else str(error)
                self._terminal.say(f"! {detail}")

    # -------------------------------------------------------------------------------------------- commands

    async def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        match name:
            case "":
                return
            case "/list":
                self._list()
            case "/open":
                self._conv = self._named(rest)
                self._terminal.say(f"-- {self._conv}", _BOLD)
                await self._history(PAGE)
                await self._mark_read(self._conv)
            case "/history":
                self._named("")
                await self._history(int(rest or PAGE))
            case "/read":
                await self._mark_read(self._named(rest))
            case "/help":
                self._terminal.say(HELP)
            case _ if line.startswith("/"):
                self._terminal.say(f"! {name} is no command; /help lists them")
            case _:
                conv = self._named("")
                outgoing = await self._client.send(conv, line)
                self._sending[outgoing.client_id] = line

    def _named(self, text: str) -> str:
        """A user, a conversation, or by default the open one."""
        text = text.strip()
        if not text:
            if not self._conv:
                raise UsageError("no conversation is open: /open USER")
            return self._conv
        return parse_conv(text).name if ":" in text else pair_conv(self._user, check_id("user", text))

    def _row(self, conv: str) -> Conversation | None:
        return next((row for row in self._client.conversations() if row.conv == conv), None)

    def _list(self) -> None:
        rows = self._client.conversations()
        if not rows:
            self._terminal.say("no conversations yet")
        for row in rows:
            new = f"{row.unread} new" if row.unread else ""
            who = "you" if row.last_sender == self._user else row.last_sender
            preview = clean(f"{who}: {row.preview}") if row.last_sender else ""
            self._terminal.say(f"{new:>8}  {row.conv:<32}  {preview}".rstrip(), _BOLD if row.unread else "")

    async def _history(self, count: int) -> None:
        if self._row(self._conv) is None:
            return
        page = await self._client.history(self._conv, limit=max(1, min(count, 200)))
        marks = self._client.read_marks(self._conv)
        for message in page.messages:
            self._show(message, marks.values())

    async def _mark_read(self, conv: str) -> None:
        row = self._row(conv)
        if row is not None and row.head > row.read:
            await self._client.read(conv, row.head)

    # ---------------------------------------------------------------------------------------------- events

    async def _watch(self) -> None:
        async for event in self._client.events():
            await self._take(event)

    async def _take(self, event: Event) -> None:
        match event:
            case Message():
                await self._arrived(event)
            case StateChanged():
                self._changed(event)
            case ReadMark() if event.user != self._user and event.conv == self._conv:
                self._terminal.say(f"✓✓ {event.user} has read up to {event.seq}", _DIM)
            case Connected():
                self._answered.set()
                self._terminal.say(f"{self._user} is connected to {self._address}", _DIM)
            case Disconnected() if event.final:
                self._failure = event.refused or event.reason or f"closed with {event.code}"
                self._answered.set()
            case Disconnected():
                reason = event.reason or event.code
                self._terminal.say(f"not connected ({reason}); next try in {event.retry_in_s:.0f} s", _DIM)

    async def _arrived(self, message: Message) -> None:
        if message.client_id in self._sending or message.is_control:
            return  # shown with its mark; or nobody's words
        if message.conv == self._conv:
            self._show(message, ())
            await self._client.read(message.conv, message.seq)
        elif message.sender != self._user:
            self._terminal.say(f"({message.conv}) {message.sender}: {clean(message.text)}", _DIM)

    def _changed(self, event: StateChanged) -> None:
        text = self._sending.pop(event.client_id, None)
        if text is None:
            return
        if event.state is Delivery.REFUSED:
            self._terminal.say(f"✗ {event.code}: {event.detail}  ({text})")
        else:
            where = "" if event.conv == self._conv else f"({event.conv}) "
            self._terminal.say(f"{_clock()} {where}[{event.seq}] you: {clean(text)}  ✓")

    def _show(self, message: Message, read: Iterable[int]) -> None:
        if message.is_control:
            return
        own = message.sender == self._user
        mark = "" if not own else "  ✓✓" if any(seq >= message.seq for seq in read) else "  ✓"
        who = "you" if own else message.sender
        self._terminal.say(f"{_clock(message.ts_ms)} [{message.seq}] {who}: {clean(message.text)}{mark}")


def _hand(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str | None], line: str | None) -> None:
    loop.call_soon_threadsafe(lines.put_nowait, line)


def _clock(ts_ms: int = 0) -> str:
    return time.strftime("%H:%M", time.localtime(ts_ms / 1000 if ts_ms else None))
