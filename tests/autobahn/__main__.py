"""Autobahn's sections 1-7, 9 and 10 against the listener's echo build, plain and over TLS.

    make autobahn                                   everything, 301 cases a transport
    python -m tests.autobahn --quick --json FILE    without section 9 (sizes up to 16 MiB, 65,536 fragments)

Exit 0: nothing failed. 1: something did, or the server reported a fault of its own. 2: no Python 2.7 here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.facts import gather
from fastim.node.tls import dev_certificate
from tests.autobahn import suite
from tests.autobahn.suite import ROOT, Absent, Verdict

DEADLINE_S = 600.0


class Failed(Exception):
    """The echo server did not start, or ended with a fault of its own."""


def build_echo() -> None:
    """build/echo, as setup.py describes it."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build"],
        cwd=ROOT, env=os.environ | {"FASTIM_BUILD": "echo"}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@contextmanager
def echo_server(*pair: str) -> Iterator[int]:
    """A running echo server: its port. Raises Failed when it ends with a fault."""
    environment = {key: value for key, value in os.environ.items() if key != "FASTIM_BUILD"}
    environment["PYTHONPATH"] = f"{ROOT / 'build' / 'echo' / 'lib'}:{ROOT}"
    process = subprocess.Popen(
        # -P: the sources in ROOT must not come before the build.
        [sys.executable, "-P", "-m", "tests.autobahn.echo", *pair],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.strip().isdigit():
            raise Failed("the echo server did not start")
        yield int(line)
        process.stdin.close()
        if process.wait(30):
            raise Failed("the echo server reported a fault of its own, see above")
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def run(sections: tuple[str, ...]) -> dict[str, Any]:
    """Both transports. Raises Absent, Failed."""
    wstest = suite.install()
    build_echo()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        pair = [str(path) for path in dev_certificate(Path(directory))]
        for name, scheme, certificate in (("plain", "ws", []), ("tls", "wss", pair)):
            began = time.monotonic()
            with echo_server(*certificate) as port:
                index = suite.fuzz(wstest, f"{scheme}://127.0.0.1:{port}/v1/ws", sections, name, DEADLINE_S)
            verdict = Verdict(index)
            found[name] = verdict.summary() | {"seconds": round(time.monotonic() - began, 1)}
            print(f"{name}: {verdict.cases} cases, failed {verdict.failed or 'none'}", flush=True)
            print(f"    behaviour {dict(verdict.behaviour)}, close {dict(verdict.close)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.autobahn", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="without section 9")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    suite.HOME.mkdir(parents=True, exist_ok=True)
    facts = gather()
    try:
        found = run(suite.QUICK if options.quick else suite.SECTIONS)
    except Absent as reason:
        print(f"autobahn: {reason}", file=sys.stderr)
        return 2
    except Failed as reason:
        print(f"autobahn: {reason}", file=sys.stderr)
        return 1
    expected = suite.EXPECTED["quick" if options.quick else "whole"]
    failed = sum(len(one["failed"]) for one in found.values())
    whole = all(one["cases"] == expected for one in found.values())
    result = facts | {
        "suite": [*suite.WITHOUT_DEPENDENCIES],
        "good": whole and not failed,
        "transports": found,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    total = sum(one["cases"] for one in found.values())
    print(f"autobahn: {total} cases of {expected * len(found)}, {failed} failed")
    return 0 if result["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
