"""Attack a live server, and say what did not hold.

    python -m tests.attack --frames 1000000 [--json FILE]    malformed frames (P10); prints hits per branch
    python -m tests.attack slow [--slow 2000 --good 8000]    clients that do not read (P9)

Exit 0: everything held. 1: something did not, said on standard error.
Sealed frames have an attack of their own: python -m tests.attack.sealed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import uvloop

from bench.facts import gather
from tests.attack import frames, slow


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.attack", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("what", nargs="?", choices=("frames", "slow"), default="frames")
    parser.add_argument("--frames", type=int, default=1_000_000, help="refusals to reach (1,000,000)")
    parser.add_argument("--batch", type=int, default=32, help="refused frames of a random session (32)")
    parser.add_argument("--asan", action="store_true", help="the server runs on the build of `make asan`")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slow", type=int, default=2_000, help="clients that do not read (2,000)")
    parser.add_argument("--good", type=int, default=8_000, help="clients that do (8,000)")
    parser.add_argument("--json", type=Path, help="write the result there")
    return parser


def main() -> int:
    options = _parser().parse_args()
    uvloop.install()
    facts = gather()
    if options.what == "slow":
        found = slow.run(options.good, options.slow)
        for name, value in found.items():
            print(f"{name}: {value}")
        took = found["last_closed_s"] - found["filled_s"]
        last = (
            f"slow: {found['user_kib_each']} KiB user, {found['kernel_kib_each']} KiB kernel each, closed"
            f" {took:.1f} s after their windows were full, good p99 {found['good_p99_ms']} ms"
        )
        return _end(facts | found, options.json, last)
    found = frames.run(options.frames, options.seed, options.batch, asan=options.asan)
    for name, count in found["branches"].items():
        print(f"{count:>10,}  {name}")
    people = found["bystanders"]
    print(f"bystanders: {people['sent']:,} messages, {people['read']:,} read, ms {people['ms']}")
    print(f"memory: {found['rss']}")
    last = f"attack: {found['refused']:,} frames refused in {found['seconds']} s"
    return _end(facts | found, options.json, last)


def _end(result: dict[str, Any], path: Path | None, last: str) -> int:
    for fault in result["faults"]:
        print(f"attack: {fault}", file=sys.stderr)
    result["good"] = not result["faults"]
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{last}, {len(result['faults'])} faults")
    return 0 if result["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
