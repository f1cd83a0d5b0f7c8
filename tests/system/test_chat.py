"""`fastim chat` at a pipe: two people, a server that is killed, and what is there afterwards."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.system.served import Served, environment, run_command


class Person:
    """`fastim chat USER` with its input and output at hand."""

    def __init__(self, server: Served, user: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "fastim", "chat", user, "--data", str(server.data),
                "--url", f"wss://127.0.0.1:{server.ws_port}", *arguments,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment(),
        )  # fmt: skip
        self.heard = ""
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.heard += line

    def __enter__(self) -> Self:
        self.hears("is connected to")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def says(self, *lines: str) -> None:
        assert self._process.stdin is not None
        for line in lines:
            self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hears(self, words: str, within_s: float = 15.0) -> str:
        """Until the words are there; returns the last line that holds them."""
        deadline = time.monotonic() + within_s
        while words not in self.heard:
            assert time.monotonic() < deadline, f"{words!r} is not in:\n{self.heard}"
            time.sleep(0.01)
        return next(line for line in reversed(self.heard.splitlines()) if words in line)

    def leaves(self) -> int:
        self.says("/quit")
        return self._process.wait(20)


def test_two_people_talk_and_everything_is_there_after_a_kill(tmp_path: Path) -> None:
    server = Served(tmp_path)
    try:
        server.announced()
        with Person(server, "alice") as alice, Person(server, "bob") as bob:
            alice.hears("no conversations yet")
            alice.says("/open bob", "hello bob 你好")
            assert alice.hears("[1] you: hello bob 你好").endswith("✓")
            bob.hears("(p:alice:bob) alice: hello bob 你好")
            bob.says("/list")
            assert re.search(r"1 new +p:alice:bob +alice: hello bob 你好", bob.hears("1 new"))
            bob.says("/open alice")
            bob.hears("[1] alice: hello bob 你好")
            alice.hears("✓✓ bob has read up to 1")
            bob.says("hello alice")
            alice.hears("[2] bob: hello alice")
            assert alice.leaves() == 0
            assert bob.leaves() == 0
        server.send("bob", "while you were away", "alice")
        server.signal(signal.SIGKILL)
    finally:
        server.end()
    server = Served(tmp_path)
    try:
        server.announced()
        with Person(server, "bob") as bob:
            assert re.search(r"1 new +p:alice:bob +alice: while you were away", bob.hears("1 new"))
            bob.says("/open alice")
            bob.hears("[3] alice: while you were away")
            assert bob.hears("[2] you: hello alice").endswith("✓✓")
            assert bob.leaves() == 0
        # A device that holds nothing asks the server for all of it.
        with Person(server, "alice", "--device", "new", "--store", str(tmp_path / "new.db")) as alice:
            alice.says("/open bob")
            alice.hears("[1] you: hello bob 你好")
            alice.hears("[3] you: while you were away")
            assert alice.leaves() == 0
        assert server.signal(signal.SIGTERM) == 0
    finally:
        server.end()


def test_mistakes_at_the_prompt_are_told_and_end_nothing(tmp_path: Path) -> None:
    server = Served(tmp_path)
    try:
        server.announced()
        with Person(server, "alice") as alice:
            alice.says("hello?")
            alice.hears("! no conversation is open: /open USER")
            alice.says("/open a b", "/open r:lobby", "/open alice", "/dance", "/history many")
            alice.hears("! user is 'a b'")
            alice.hears("! a 1:1 conversation needs two users")
            alice.hears("! /dance is no command")
            assert alice.leaves() == 0
            assert "Traceback" not in alice.heard
    finally:
        server.end()


def test_message_to_somebody_who_was_never_here_waits_for_him(tmp_path: Path) -> None:
    server = Served(tmp_path)
    try:
        server.announced()
        with Person(server, "alice") as alice:
            alice.says("/open bob", "anybody there?")
            alice.hears("you: anybody there?")
            assert alice.leaves() == 0
        with Person(server, "bob") as bob:
            assert bob.hears("anybody there?")
            assert bob.leaves() == 0
    finally:
        server.end()


def test_what_others_wrote_cannot_command_the_terminal(tmp_path: Path) -> None:
    server = Served(tmp_path)
    try:
        server.announced()
        with Person(server, "bob") as bob:
            server.send("bob", "a\x1b]0;owned\x07b\x9b31mc\r\nd", "alice")
            assert "\x1b" not in bob.hears("(p:alice:bob) alice: a")
            assert "\x9b" not in bob.heard
            bob.says("/list")
            bob.hears("1 new")
            assert "\x1b" not in bob.heard
    finally:
        server.end()


def test_server_that_does_not_let_us_in_ends_the_chat_with_1(tmp_path: Path) -> None:
    server = Served(tmp_path)
    try:
        server.announced()
        ca = str(server.data / "dev-tls-cert.pem")
        where = ["--url", f"wss://127.0.0.1:{server.ws_port}", "--ca", ca]
        done = run_command("chat", "alice", "--token", "x.y.z", *where, code=1, cwd=tmp_path)
        assert "unauthenticated" in done.stderr
        done = run_command("chat", "alice", "--token", "x", "--url", "http://h", code=2, cwd=tmp_path)
        assert "must start with ws:// or wss://" in done.stderr
        done = run_command("chat", "a b", "--token", "x", code=2, cwd=tmp_path)
        assert "user is 'a b'" in done.stderr
    finally:
        server.end()
