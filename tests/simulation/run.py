"""The command: many seeds of the correct build, and every planted error on its pinned seed.

    python -m tests.simulation.run --seeds 2000              fresh seeds 0..1999, then the planted errors
    python -m tests.simulation.run --seed 17 --verbose       one seed, with its plan and its trace
    python -m tests.simulation.run --planted                 only the planted errors
    python -m tests.simulation.run --search NAME --seeds 500 look for seeds that catch one planted error

Exits 1 if a seed of the correct build fails or a planted error is not caught.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from tests.simulation.planted import PLANTED, Planted
from tests.simulation.world import Outcome, run_seed


def one(job: tuple[int, str]) -> Outcome:
    seed, error = job
    return run_seed(seed, PLANTED[error] if error else None)


def outcomes(jobs: list[tuple[int, str]], processes: int) -> Iterator[Outcome]:
    """In the order of the jobs."""
    if processes == 1 or len(jobs) < 4:
        yield from map(one, jobs)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(one, jobs, chunksize=4)


def same_hashes() -> None:
    """Sets of strings iterate alike in every run only with a fixed hash seed: start again with one."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(
            sys.executable, [sys.executable, *warning_options(), "-m", "tests.simulation.run", *sys.argv[1:]]
        )


def warning_options() -> list[str]:
    return [f"-W{option}" for option in sys.warnoptions]


def show(outcome: Outcome, error: str = "") -> None:
    plant = f" --plant {error}" if error else ""
    again = f"python -m tests.simulation.run --seed {outcome.seed}{plant} --verbose"
    print(f"seed {outcome.seed} FAILS; again: {again}")
    for text in outcome.violations[:12]:
        print(f"    {text}")


def correct_build(seeds: Iterable[int], processes: int) -> tuple[int, Counter[str]]:
    failing = 0
    sums: Counter[str] = Counter()
    for outcome in outcomes([(seed, "") for seed in seeds], processes):
        sums.update(outcome.figures)
        sums["seeds"] += 1
        if outcome.violations:
            failing += 1
            show(outcome)
            sys.stdout.flush()
    return failing, sums


def planted_errors(names: Iterable[str], processes: int) -> int:
    """Each on its pinned seed. Returns how many were not caught."""
    chosen = list(names)
    missed = 0
    jobs = [(PLANTED[name].seed, name) for name in chosen]
    for name, outcome in zip(chosen, outcomes(jobs, processes), strict=True):
        error = PLANTED[name]
        caught = caught_by(error, outcome)
        if caught:
            print(f"caught  {name:<46} seed {error.seed:<4} {caught[0][:110]}")
        else:
            missed += 1
            print(f"MISSED  {name:<46} seed {error.seed:<4} found only {outcome.violations[:2]}")
    return missed


def caught_by(error: Planted, outcome: Outcome) -> list[str]:
    """The violations of the right kinds. A patch that does not fit the code any more catches nothing."""
    if "error" not in error.kinds and any(" fatal: " in text for text in outcome.violations):
        return []
    return [text for text in outcome.violations if text.split(":")[0] in error.kinds]


def search(name: str, seeds: Iterable[int], processes: int, enough: int) -> int:
    error = PLANTED[name]
    found = 0
    for outcome in outcomes([(seed, name) for seed in seeds], processes):
        caught = caught_by(error, outcome)
        if caught:
            print(f"{name}: seed {outcome.seed} {caught[0][:120]}", flush=True)
            found += 1
            if found >= enough:
                return 0
    print(f"{name}: caught by {found} seeds")
    return 0 if found else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.simulation.run")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--plant", default="")
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--search", default="")
    parser.add_argument("--enough", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    same_hashes()
    logging.disable()
    if options.seed is not None:
        plant = PLANTED[options.plant] if options.plant else None
        outcome = run_seed(options.seed, plant, verbose=options.verbose)
        print("\n".join(outcome.trace))
        for text in outcome.violations:
            print(text)
        print(f"seed {outcome.seed}: {len(outcome.violations)} violations, {dict(outcome.figures)}")
        return 1 if outcome.violations else 0
    seeds = range(options.start, options.start + options.seeds)
    if options.search:
        return search(options.search, seeds, options.processes, options.enough)
    started = time.monotonic()
    failing, sums = (0, Counter[str]()) if options.planted else correct_build(seeds, options.processes)
    missed = planted_errors(PLANTED, options.processes)
    seconds = time.monotonic() - started
    figures = ", ".join(f"{name} {count:,}" for name, count in sorted(sums.items()))
    print(f"simulation: {failing} failing; {len(PLANTED) - missed} of {len(PLANTED)} planted errors caught;"
          f" {seconds:.1f} s on {options.processes} processes; {figures}")  # fmt: skip
    return 1 if failing or missed else 0


if __name__ == "__main__":
    sys.exit(main())
