"""python -m bench road | recovery | core | fanout | idle | storm: see the modules, and results/README.md."""

from __future__ import annotations

import argparse
import sys

from bench import core, fanout, idle, recovery, road, storm

COMMANDS = {
    "road": road, "recovery": recovery, "core": core, "fanout": fanout, "idle": idle, "storm": storm,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the real server.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").strip()
        sub = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    args = parser.parse_args(arguments)
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
