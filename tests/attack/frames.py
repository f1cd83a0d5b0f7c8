"""Malformed frames against a live server, until so many were refused (promise P10).

First every rule once, then at random; beside the attackers people chat. It fails when a branch was never hit
or an answer fits none, when a bystander lost, repeated or reordered a message or waited too long, when
resident memory grows, when the server logs a fault or ends by itself, when a planted secret is in its log, or
when the audit is not clean.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.attack.branches import Branches
from tests.attack.hostile import BODY, TOKEN, Random, Script, catalogue
from tests.attack.stage import OTHERS_CPU, Bystanders, Stage
from tests.attack.swarm import Swarm

ATTACKERS: Final = 24
PAIRS: Final = 10
PER_S: Final = 2.0
"""What they say is stored, and the store remembers pages of it: 300 bytes a message that are no leak."""
QUIET_S: Final = 3.0
SAMPLE_S: Final = 0.5
SHORT: Final = 500_000
"""With fewer refusals a slope per million says nothing; then growth itself is bounded. Neither says anything
of the sanitizer's build, which keeps what was freed."""
SLOPE_MIB: Final = 1.0
GROWTH_MIB: Final = 8.0
LATENCY_MS: Final = 250.0
"""p99 of the bystanders under attack: one core serves them and all that the other core can throw at it."""


async def attack(stage: Stage, branches: Branches, wanted: int, seed: int, batch: int) -> Swarm:
    """Returns when `wanted` refusals were counted and every rule was broken once."""
    swarm = Swarm(stage.server.ws_port, stage.server.token, branches)
    await swarm.start()
    rng = random.Random(seed)
    once = [*catalogue(stage.server.token("mallory-himself"))]
    slow = [script for script in once if script.wait_s]
    quick = [script for script in once if not script.wait_s]
    rng.shuffle(quick)
    shared = iter(quick)
    endless = Random(seed, batch)

    def scripts() -> Iterator[Script]:
        yield from shared
        while swarm.refused < wanted:
            yield endless.next()

    # The patient ones have names of their own: nobody comes with their device while they wait.
    patient = [
        asyncio.create_task(swarm.work(ATTACKERS + number, iter([script])))
        for number, script in enumerate(slow)
    ]
    workers = [asyncio.create_task(swarm.work(number, scripts())) for number in range(ATTACKERS)]
    watching = asyncio.create_task(_watch(stage, swarm))
    await asyncio.gather(*workers, *patient)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    swarm.stop()
    return swarm


async def _watch(stage: Stage, swarm: Swarm) -> None:
    for _ in itertools.count():
        stage.sample(swarm.refused)
        await asyncio.sleep(SAMPLE_S)


def run(wanted: int, seed: int, batch: int, *, asan: bool = False) -> dict[str, Any]:
    """One attack: the result, with what did not hold in `faults`. asan: on the build of `make asan`."""
    branches = Branches()
    os.sched_setaffinity(0, {OTHERS_CPU})
    with tempfile.TemporaryDirectory() as directory:
        stage = Stage(Path(directory), asan=asan)
        stage.secrets |= {"body of a message": BODY, "token that was refused": TOKEN.encode()}
        stage.start()
        standers = None
        try:
            standers = Bystanders(stage, PAIRS, PER_S)
            # The bystanders are measured: what attackers need of the core comes behind them.
            os.nice(5)
            time.sleep(QUIET_S)
            standers.phase("attack")
            began = time.monotonic()
            swarm = asyncio.run(attack(stage, branches, wanted, seed, batch))
            seconds = time.monotonic() - began
            people = standers.end()
            for user, token in swarm.tokens.items():
                stage.secrets[f"token of {user}"] = token.encode()
            links = stage.metric("fastim_connections ")
            stood = stage.stop()
        finally:
            if standers is not None:
                standers.kill()
            stage.server.end()
    result = {
        "refused": swarm.refused,
        "connections": swarm.connections,
        "seconds": round(seconds, 1),
        "seed": seed,
        "build": "asan" if asan else "release",
        "branches": dict(sorted(branches.hits.items())),
        "bystanders": people,
        "rss": stage.growth(),
        "links_left": links,
        "server": stood,
    }
    return result | {"faults": [*_faults(result, branches, swarm, wanted)]}


def _faults(result: dict[str, Any], branches: Branches, swarm: Swarm, wanted: int) -> Iterator[str]:
    if swarm.refused < wanted:
        yield f"{swarm.refused:,} refused of {wanted:,}"
    if missed := branches.missed():
        yield f"never hit: {', '.join(missed)}"
    for answer, count in branches.unknown.most_common(10):
        yield f"an answer of no branch, {count} times: {answer}"
    yield from swarm.failures[:10]
    people = result["bystanders"]
    if people["wrong"] or people["dropped"] or people["read"] != people["sent"]:
        yield f"bystanders: {people}"
    asan = result["build"] == "asan"
    if people["ms"]["attack"]["p99"] > LATENCY_MS and not asan:
        yield f"bystanders' p99 is {people['ms']['attack']['p99']} ms; limit {LATENCY_MS}"
    rss = result["rss"]
    if wanted >= SHORT and not asan and rss["mib_per_million"] >= SLOPE_MIB:
        yield f"memory grows by {rss['mib_per_million']} MiB per million; limit {SLOPE_MIB}"
    if wanted < SHORT and not asan and rss["mib"] >= GROWTH_MIB:
        yield f"memory grew by {rss['mib']} MiB; limit {GROWTH_MIB}"
    server = result["server"]
    if server["exit"] or server["audit"]:
        yield f"the server ended with {server['exit']}, its audit with {server['audit']}"
    for line in server["log_faults"][:10]:
        yield f"logged: {line}"
    if server["secrets_in_log"]:
        yield f"in the log: {', '.join(server['secrets_in_log'])}"
