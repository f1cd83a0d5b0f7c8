"""A server under attack: `fastim serve` with secrets planted in its configuration, watched from outside.

What must hold afterwards, whatever was done to it, is said once, in `Stage.verdict`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Final

from bench.server import ROOT, Server, to_toml
from tests.leaks import planted

SERVER_CPU: Final = 0
OTHERS_CPU: Final = 1
MIB: Final = 1 << 20


def sanitized() -> dict[str, str]:
    """The environment in which a process runs on the build of `make asan`; it ends at the first report."""
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        "PYTHONPATH": f"{ROOT / 'build' / 'asan' / 'lib'}:{ROOT}",
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYCRYPTODOME_DISABLE_DEEPBIND": "1",
    }


class Stage:
    """secrets: what must be in no log. settings: tables laid over its own. asan: which build serves."""

    def __init__(
        self, directory: Path, settings: dict[str, Any] | None = None, *, asan: bool = False
    ) -> None:
        self.planted_key = planted("key")
        self.planted_secret = planted("webhook")
        node = {
            "failures_per_minute": 1_000_000, "auth_timeout_ms": 2_000, "origins": ["https://chat.example"],
        }  # fmt: skip
        tables: dict[str, Any] = {
            "push": {"webhook": {"url": "http://127.0.0.1:9/", "secret": self.planted_secret}},
            "node": node | (settings or {}).pop("node", {}),
        } | (settings or {})
        self.server = Server(directory, tables, cpu=SERVER_CPU)
        if asan:
            self.server.environment = sanitized()
        with self.server.config.open("a") as file:
            issuer = {"issuer": "planted", "kid": "k1", "algorithm": "HS256", "key": self.planted_key}
            file.write(to_toml(issuer, "[auth.issuers]"))
        self.secrets: dict[str, bytes] = {
            "signing key of the configuration": self.planted_key.encode(),
            "secret of the webhook": self.planted_secret.encode(),
        }
        self.rss: list[tuple[int, int]] = []
        """(refused so far, bytes)"""

    def start(self) -> None:
        # What it prints for people holds tokens on purpose; its log must not.
        self.server.spawn()
        self.server.wait_ready()
        if "asan" in self.server.environment.get("PYTHONPATH", "") and not self._maps("build/asan"):
            raise RuntimeError("the server does not run on the build of `make asan`")
        for pem in self.server.data.glob("*.pem"):
            for line in pem.read_bytes().splitlines():
                if b"-" not in line and len(line) > 40 and "cert" not in pem.name:
                    self.secrets[f"private key in {pem.name}"] = line

    def _maps(self, part: str) -> bool:
        return part in Path(f"/proc/{self.server.pid}/maps").read_text()

    def sample(self, refused: int) -> None:
        self.rss.append((refused, self.server.memory_kb()["VmRSS"] * 1_024))

    def metric(self, name: str) -> float:
        """The sum of everything whose name and labels begin so."""
        url = f"http://127.0.0.1:{self.server.http_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def growth(self) -> dict[str, float]:
        """Of resident memory once it is warm: in MiB, and as a slope per million refusals (least squares)."""
        warm = self.rss[len(self.rss) // 4 :]
        n = len(warm)
        if n < 8:
            return {"mib": 0.0, "mib_per_million": 0.0, "samples": float(n)}
        mean_x, mean_y = sum(x for x, _ in warm) / n, sum(y for _, y in warm) / n
        spread = sum((x - mean_x) ** 2 for x, _ in warm)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in warm) / spread if spread else 0.0
        return {
            "mib": round((warm[-1][1] - warm[0][1]) / MIB, 2),
            "mib_per_million": round(slope * 1e6 / MIB, 2),
            "samples": float(n),
        }

    def log(self) -> tuple[list[str], list[str]]:
        """(lines of a level above warning or with a traceback, names of secrets that were found)."""
        text = self.server.log.read_bytes()
        lines = [line for line in text.splitlines() if line.startswith(b"ts=")]
        loud = (b" level=error ", b" level=critical ", b" exception=", b" msg=socket", b'msg="socket')
        bad = [line.decode(errors="replace")[:300] for line in lines if any(word in line for word in loud)]
        bad += [line.decode() for line in text.splitlines() if line.startswith(b"Traceback")]
        logged = b"\n".join(lines)
        return bad, sorted(name for name, secret in self.secrets.items() if secret in logged)

    def stop(self, ids: Path | None = None) -> dict[str, Any]:
        """End it, and say how it stood. ids: where to write each obligation's state."""
        code = self.server.stop()
        bad, leaked = self.log()
        audit, report = self.server.audit(ids=ids)
        return {
            "exit": code,
            "log_lines": len(self.server.log.read_bytes().splitlines()),
            "log_faults": bad,
            "secrets_in_log": leaked,
            "audit": audit,
            "obligations": report["obligations"],
        }


class Bystanders:
    """The process of tests.attack.bystanders."""

    def __init__(self, stage: Stage, pairs: int, per_s: float) -> None:
        server = stage.server
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.attack.bystanders",
                str(server.ws_port), str(pairs), str(per_s),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        os.sched_setaffinity(self._process.pid, {OTHERS_CPU})
        users = [f"stander{number}{side}" for number in range(pairs) for side in "ab"]
        self._say(json.dumps({user: server.token(user) for user in users}))
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise RuntimeError("the bystanders did not connect")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def phase(self, name: str) -> None:
        self._say(name)

    def end(self) -> dict[str, Any]:
        out, _ = self._process.communicate(timeout=120)
        found: dict[str, Any] = json.loads(out)
        return found

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
