"""Autobahn's suite: found a Python 2.7 for, installed once, run, and judged.

Hides that the suite is Python 2 and needs releases of 2020. Everything lives in build/autobahn.

    Python 2.7 ──virtualenv, pins──▶ env ──wstest -m fuzzingclient──▶ reports/index.json ──▶ Verdict
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
HOME: Final = ROOT / "build" / "autobahn"
ENV: Final = HOME / "env"
VIRTUALENV: Final = "virtualenv==20.15.1"
PINS: Final = (
    "Twisted==20.3.0", "zope.interface==5.5.2", "txaio==2.1.0", "six==1.17.0", "jinja2==2.11.3",
    "markupsafe==1.1.1", "pygments==2.5.2", "klein==20.6.0", "service_identity==18.1.0", "pyOpenSSL==19.1.0",
    "cryptography==3.3.2", "unittest2==1.1.0",
)  # fmt: skip
WITHOUT_DEPENDENCIES: Final = ("autobahn==0.10.9", "autobahntestsuite==25.10.1")
"""The suite names a release of Twisted that no Python 2.7 can build any more."""

SECTIONS: Final = ("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.*", "10.*")
QUICK: Final = tuple(section for section in SECTIONS if section != "9.*")
EXPECTED: Final[Mapping[str, int]] = {"quick": 247, "whole": 301}
"""How many cases these are; fewer means that the suite stopped early."""

GOOD: Final = frozenset({"OK", "NON-STRICT", "INFORMATIONAL"})
ABSENT: Final = (
    "no Python 2.7 was found, and Autobahn's suite runs on nothing newer: name one in PYTHON2, or put "
    "python2.7 on PATH. The recorded result is in bench/results/autobahn-*.json."
)


class Absent(Exception):
    """What the suite needs is not on this machine."""


def find_python2() -> Path | None:
    """PYTHON2, python2.7 or python2 on PATH, pyenv's; only one that runs and says 2.7."""
    found = [os.environ.get("PYTHON2", ""), shutil.which("python2.7") or "", shutil.which("python2") or ""]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found += [str(path) for path in sorted(pyenv.glob("versions/2.7*/bin/python2.7"))]
    for candidate in filter(None, found):
        try:
            done = subprocess.run([candidate, "--version"], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            continue
        # Python 2 says its version on standard error; a shim without an installation fails.
        if done.returncode == 0 and "Python 2.7" in done.stdout + done.stderr:
            return Path(candidate)
    return None


def install() -> Path:
    """wstest in an environment of its own, made when missing. Raises Absent without a Python 2.7."""
    wstest = ENV / "bin" / "wstest"
    if (ENV / "installed").exists():
        return wstest
    python2 = find_python2()
    if python2 is None:
        raise Absent(ABSENT)
    shutil.rmtree(ENV, ignore_errors=True)
    tool = HOME / "tool"
    venv.create(tool, with_pip=True)
    _quietly(tool / "bin" / "pip", "install", VIRTUALENV)
    _quietly(tool / "bin" / "virtualenv", "-p", python2, ENV)
    _quietly(ENV / "bin" / "pip", "install", *PINS)
    _quietly(ENV / "bin" / "pip", "install", "--no-deps", *WITHOUT_DEPENDENCIES)
    (ENV / "installed").touch()
    return wstest


def _quietly(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise Absent(f"{' '.join(map(str, command))} failed")


def fuzz(wstest: Path, url: str, sections: Iterable[str], name: str, deadline_s: float) -> dict[str, Any]:
    """Run the sections against `url`; the suite's own index of results, by case."""
    reports = HOME / f"reports-{name}"
    shutil.rmtree(reports, ignore_errors=True)
    spec = HOME / f"spec-{name}.json"
    servers = [{"agent": name, "url": url, "options": {"version": 18}}]
    cases = {"cases": [*sections], "exclude-cases": [], "exclude-agent-cases": {}}
    spec.write_text(json.dumps({"outdir": str(reports), "servers": servers, **cases}))
    done = subprocess.run(
        [str(wstest), "-m", "fuzzingclient", "-s", str(spec), "-u", "0"],
        capture_output=True, text=True, timeout=deadline_s,
    )  # fmt: skip
    try:
        found: dict[str, Any] = json.loads((reports / "index.json").read_text())[name]
    except (OSError, KeyError, ValueError):
        sys.stderr.write(done.stdout[-2_000:] + done.stderr[-2_000:])
        raise
    return found


class Verdict:
    """What the suite found. failed: cases whose behaviour or whose close is none of GOOD."""

    def __init__(self, index: Mapping[str, Mapping[str, Any]]) -> None:
        self.cases = len(index)
        self.behaviour = Counter(str(case["behavior"]) for case in index.values())
        self.close = Counter(str(case["behaviorClose"]) for case in index.values())
        self.failed = sorted(
            name
            for name, case in index.items()
            if case["behavior"] not in GOOD or case["behaviorClose"] not in GOOD
        )
        self.not_strict = sorted(name for name, case in index.items() if case["behavior"] == "NON-STRICT")

    def summary(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "behaviour": dict(self.behaviour),
            "close": dict(self.close),
            "failed": self.failed,
            "not_strict": self.not_strict,
        }
