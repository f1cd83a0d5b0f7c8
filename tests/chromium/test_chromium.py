"""A real browser: it connects over wss, two people chat in it, and a page of another origin is refused.

The page is served by a small HTTP server of the test, whose /ended is answered when the page has reported:
the browser's load event waits for that, and then it prints the document.
"""

from __future__ import annotations

import json
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from bench.server import Server

PAGE: Final = Path(__file__).with_name("page.html").read_text()
DEADLINE_S: Final = 30.0
FLAGS: Final = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--ignore-certificate-errors", "--window-size=900,500",
)  # fmt: skip


class Site:
    """Serves the page, and hears its result."""

    def __init__(self) -> None:
        self.page = ""
        self.result = ""
        self.ended = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/ended":
                    site.ended.wait(DEADLINE_S)
                self._answer(b"" if self.path != "/" else site.page.encode())

            def do_POST(self) -> None:
                site.result = self.rfile.read(int(self.headers["content-length"])).decode()
                self._answer(b"")
                site.ended.set()

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/html; charset=utf-8")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def close(self) -> None:
        self.ended.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture
def server(tmp_path: Path, site: Site) -> Iterator[Server]:
    """wss with the development certificate; pages of the site may connect."""
    made = Server(tmp_path, {"node": {"plain": False, "origins": [site.origin]}})
    made.spawn()
    _until_it_answers(made)
    yield made
    made.end()


def _until_it_answers(server: Server) -> None:
    for _ in range(600):
        assert server.process is not None
        assert server.process.poll() is None, server.log_tail()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/ready", timeout=1):
                return
        except OSError:
            threading.Event().wait(0.05)
    raise AssertionError(server.log_tail())


def browse(site: Site, server: Server, *flags: str, directory: Path) -> str:
    """The document when the page has ended."""
    settings = {
        "url": f"wss://127.0.0.1:{server.ws_port}/v1/ws",
        "tokens": {user: server.token(user) for user in ("alice", "bob")},
    }
    site.page = PAGE.replace("/*SETTINGS*/null", json.dumps(settings))
    done = subprocess.run(
        ["chromium", *FLAGS, f"--user-data-dir={directory}", "--dump-dom", *flags, f"{site.origin}/"],
        capture_output=True, text=True, timeout=2 * DEADLINE_S,
    )  # fmt: skip
    assert site.result, done.stderr[-2_000:]
    return done.stdout


def test_two_people_chat_in_a_browser_over_wss(
    site: Site, server: Server, tmp_path: Path, need: Callable[..., None]
) -> None:
    need("chromium")
    document = browse(site, server, directory=tmp_path / "profile")
    assert site.result == 'good: seq 1 stored, bob read "你好 from a browser"'
    assert f'<p id="result">{site.result}</p>' in document
    assert '<li>alice: open, subprotocol fastim.v1, extensions ""</li>' in document
    assert server.stop() == 0
    code, report = server.audit()
    assert (code, report["states"]["acked"]) == (0, 1)


def test_a_page_of_another_origin_is_refused(
    site: Site, server: Server, tmp_path: Path, need: Callable[..., None]
) -> None:
    need("chromium")
    other = Site()
    try:
        browse(other, server, directory=tmp_path / "profile")
        assert other.result == "bob: refused"
    finally:
        other.close()
