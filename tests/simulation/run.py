"""The command: many seeds of the correct build, and every planted error on its pinned seed.

    python -m tests.simulation.run --seeds 2000              seeds 0..1999 of each model, then planted errors
    python -m tests.simulation.run --model cluster ...       only one of the models (models.py)
    python -m tests.simulation.run --seed 17 --model cluster --verbose    one seed, with plan and trace
    python -m tests.simulation.run --planted                 only the planted errors
    python -m tests.simulation.run --search NAME --seeds 500 look for seeds that catch one planted error

A planted error runs twice on its stage: without the error (the control, which must pass), then with it.
Exits 1 if a seed of the correct build fails, a planted error is not caught, or a control fails. --json
prints one object per outcome, for tests.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.simulation.models import MODELS, run_seed
from tests.simulation.planted import PLANTED, Planted
from tests.simulation.world import Outcome


class Job(NamedTuple):
    seed: int
    error: str = ""
    control: bool = False
    model: str = "single"


def one(job: Job) -> Outcome:
    error = PLANTED[job.error] if job.error else None
    return run_seed(job.seed, error, control=job.control, model=job.model)


def outcomes(jobs: list[Job], processes: int) -> Iterator[Outcome]:
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
        warnings = [f"-W{option}" for option in sys.warnoptions]
        os.execv(sys.executable, [sys.executable, *warnings, "-m", "tests.simulation.run", *sys.argv[1:]])


def told(outcome: Outcome, **more: object) -> str:
    found = {
        "seed": outcome.seed,
        "violations": outcome.violations,
        "figures": dict(outcome.figures),
        "digest": outcome.digest,
    }
    return json.dumps(found | more)


def correct_build(
    model: str, seeds: Iterable[int], processes: int, as_json: bool
) -> tuple[int, Counter[str]]:
    failing = 0
    sums: Counter[str] = Counter()
    for outcome in outcomes([Job(seed, model=model) for seed in seeds], processes):
        sums.update(outcome.figures)
        sums["seeds"] += 1
        failing += bool(outcome.violations)
        if as_json:
            print(told(outcome))
        elif outcome.violations:
            again = f"python -m tests.simulation.run --model {model} --seed {outcome.seed} --verbose"
            print(f"seed {outcome.seed} FAILS; again: {again}")
            for text in outcome.violations[:12]:
                print(f"    {text}")
        sys.stdout.flush()
    return failing, sums


def planted_errors(model: str, processes: int, as_json: bool) -> tuple[int, int]:
    """Each on its pinned seed, after its control. Returns (not caught on a fair stage, planted)."""
    missed = 0
    errors = {name: error for name, error in PLANTED.items() if error.model == model}
    jobs = [Job(error.seed, name, control) for name, error in errors.items() for control in (True, False)]
    results = outcomes(jobs, processes)
    for (name, error), control, outcome in zip(errors.items(), results, results, strict=True):
        caught = caught_by(error, outcome)
        good = bool(caught) and not control.violations
        missed += not good
        if as_json:
            print(told(outcome, planted=name, caught=caught, control=control.violations))
            continue
        what = f"{name:<40} seed {error.seed:<3}"
        if good:
            print(f"caught  {what} {caught[0][:110]}")
        elif control.violations:
            print(f"UNFAIR  {what} the correct build fails too: {control.violations[:2]}")
        else:
            print(f"MISSED  {what} found only {outcome.violations[:2]}")
    return missed, len(errors)


def caught_by(error: Planted, outcome: Outcome) -> list[str]:
    """The violations of the right kinds. A patch that does not fit the code any more catches nothing."""
    if "error" not in error.kinds and any(" fatal: " in text for text in outcome.violations):
        return []
    return [text for text in outcome.violations if text.split(":")[0] in error.kinds]


def search(name: str, seeds: Iterable[int], processes: int, enough: int) -> int:
    found = 0
    for outcome in outcomes([Job(seed, name) for seed in seeds], processes):
        caught = caught_by(PLANTED[name], outcome)
        if caught:
            print(f"{name}: seed {outcome.seed} {caught[0][:120]}", flush=True)
            found += 1
            if found >= enough:
                return 0
    print(f"{name}: caught by {found} seeds")
    return 0 if found else 1


def one_seed(model: str, seed: int, error: str, verbose: bool, as_json: bool) -> int:
    outcome = run_seed(seed, PLANTED[error] if error else None, verbose=verbose, model=model)
    if as_json:
        print(told(outcome))
    else:
        for text in (*outcome.trace, *outcome.violations):
            print(text)
        print(f"seed {seed}: {len(outcome.violations)} violations, {dict(outcome.figures)}")
    return 1 if outcome.violations else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.simulation.run")
    parser.add_argument("--model", default="", choices=list(MODELS), help="both of them without it")
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds of the correct build")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, default=None, help="only this seed")
    parser.add_argument("--plant", default="", metavar="NAME", help="with --seed: with this planted error")
    parser.add_argument("--correct", action="store_true", help="only the correct build")
    parser.add_argument("--planted", action="store_true", help="only the planted errors")
    parser.add_argument("--search", default="", metavar="NAME", help="seeds that catch this planted error")
    parser.add_argument("--enough", type=int, default=1, help="with --search: after so many it stops")
    parser.add_argument("--verbose", action="store_true", help="with --seed: the plan and the trace")
    parser.add_argument("--json", action="store_true", help="one object per outcome")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    same_hashes()
    logging.disable()
    if options.seed is not None:
        model = options.model or "single"
        return one_seed(model, options.seed, options.plant, options.verbose, options.json)
    seeds = range(options.start, options.start + options.seeds)
    if options.search:
        return search(options.search, seeds, options.processes, options.enough)
    failing = missed = 0
    for model in [options.model] if options.model else MODELS:
        started = time.monotonic()
        sums = Counter[str]()
        more_failing = more_missed = planted = 0
        if not options.planted:
            more_failing, sums = correct_build(model, seeds, options.processes, options.json)
        if not options.correct:
            more_missed, planted = planted_errors(model, options.processes, options.json)
        failing, missed = failing + more_failing, missed + more_missed
        if not options.json:
            figures = ", ".join(f"{name} {count:,}" for name, count in sorted(sums.items()))
            seconds = time.monotonic() - started
            print(f"{figures}; {options.processes} processes, {seconds:.1f} s")
            caught = f"{planted - more_missed} of {planted} planted errors caught"
            print(f"simulation, {model}: {more_failing} failing; {caught}; {seconds:.1f} s", flush=True)
    return 1 if failing or missed else 0


if __name__ == "__main__":
    sys.exit(main())
