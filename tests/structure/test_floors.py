"""Nobody imports upwards or sideways, in Python or in Cython. The table is docs/design.md's.

A unit is a port, an actor or the core. Units of one floor do not import each other; inside a unit all may.
Floors 0 and 6 are one unit each: words that everybody uses, and the root that puts everything together.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

PACKAGE: Final = Path(__file__).parents[2] / "fastim"

FLOORS: Final[tuple[dict[str, str], ...]] = (
    dict.fromkeys(("errors", "model", "clock", "config", "observe", "auth"), "words"),
    {"_core": "_core"},
    dict.fromkeys(("protocol", "sealing"), "wire"),
    {name: name for name in ("bus", "store", "presence", "search", "push")},
    {name: name for name in ("node", "dispatch", "client")},
    {"api": "api"},
    dict.fromkeys(("app", "cli", "__main__"), "root"),
)
PLACE: Final = {name: (floor, unit) for floor, units in enumerate(FLOORS) for name, unit in units.items()}

CIMPORT: Final = re.compile(
    r"^\s*(?:from\s+(?P<base>[\w.]+)\s+c?import\s*(?:\((?P<many>[^)]*)\)|(?P<names>[^\n#]+))"
    r"|c?import\s+(?P<plain>[^\n#]+))",
    re.MULTILINE,
)
ALIAS: Final = re.compile(r"\s+as\s+\w+")


def imports(source: Path) -> Iterator[str]:
    """Dotted names a file imports. `from a import b` yields a.b: b may be a module."""
    text = source.read_text()
    if source.suffix in (".pyx", ".pxd"):
        for match in CIMPORT.finditer(text):
            listed = ALIAS.sub("", match["many"] or match["names"] or match["plain"])
            prefix = f"{match['base']}." if match["base"] else ""
            yield from (prefix + name for name in re.findall(r"[\w.]+", listed))
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ("." * node.level) + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(package: Path) -> list[str]:
    """One line per import that breaks a rule, in a package laid out like fastim/."""
    found = []
    for source in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".pyx", ".pxd")):
        parts = source.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        where = "/".join(parts) + source.suffix
        if parts[0] not in PLACE:
            found.append(f"{where}: {parts[0]} has no floor")
            continue
        floor, unit = PLACE[parts[0]]
        for name in imports(source):
            if name.startswith("."):
                found.append(f"{where}: relative import of {name}")
            if not name.startswith("fastim."):
                continue
            target = name.split(".")[1]
            if target == "__version__":
                continue
            if target not in PLACE:
                found.append(f"{where}: imports {name}, which has no floor")
                continue
            its_floor, its_unit = PLACE[target]
            if its_floor > floor or (its_floor == floor and its_unit != unit):
                found.append(f"{where}: {unit} (floor {floor}) imports {name} (floor {its_floor})")
    return found


def test_every_import_goes_to_a_lower_floor() -> None:
    assert violations(PACKAGE) == []


def plant(root: Path, path: str, text: str) -> list[str]:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
    return violations(root)


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        (
            "store/sqlite.py",
            "from fastim.node.pool import Pool\n",
            "store (floor 3) imports fastim.node.pool",
        ),
        ("store/sqlite.py", "from fastim import app\n", "store (floor 3) imports fastim.app"),
        ("store/sqlite.py", "def late():\n    import fastim.api.rest\n", "imports fastim.api.rest"),
        ("node/pool.py", "from fastim.dispatch.worker import W\n", "node (floor 4) imports fastim.dispatch"),
        ("bus/kafka.py", "import fastim.store.base as b\n", "bus (floor 3) imports fastim.store.base"),
        ("bus/kafka.py", "from . import base\n", "relative import"),
        ("_core/conn.pyx", "from fastim.protocol import Op\n", "_core (floor 1) imports fastim.protocol"),
        ("_core/conn.pxd", "from fastim.node.c cimport X\n", "_core (floor 1) imports fastim.node.c"),
        ("_core/conn.pyx", "cimport fastim.bus.window\n", "_core (floor 1) imports fastim.bus.window"),
        ("_core/conn.pyx", "    from fastim cimport api, bus\n", "_core (floor 1) imports fastim.bus"),
        ("_core/conn.pyx", "from fastim cimport (\n    bus as b,\n)\n", "_core (floor 1) imports fastim.bus"),
        ("utils/text.py", "", "utils has no floor"),
        ("bus/kafka.py", "import fastim.utils\n", "which has no floor"),
        ("_core/conn.pyx", "import fastim.sealing\n", "_core (floor 1) imports fastim.sealing (floor 2)"),
        ("sealing.py", "from fastim.bus.base import Bus\n", "wire (floor 2) imports fastim.bus.base"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, text: str, said: str) -> None:
    assert said in "\n".join(plant(tmp_path, path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("auth/__init__.py", "from fastim.model import check_id\n"),
        ("_core/conn.pyx", "from fastim._core.acks cimport AckTable\nfrom fastim.errors import PeerError\n"),
        ("_core/conn.pyx", "from fastim._core.acks cimport AckTable as T, Entry  # not fastim.bus\n"),
        ("bus/kafka.py", "from fastim.bus.base import Bus\nfrom fastim.protocol import Op\n"),
        ("api/rest.py", "from fastim.node.pool import Pool\n"),
        ("sealing.py", "from fastim._core.cipher import Sealer\nfrom fastim.protocol import Keys\n"),
        ("client/sealed.py", "from fastim.sealing import Offer\n"),
        ("app/__init__.py", "from fastim.bus.memory import MemoryBus\nfrom fastim.cli import main\n"),
    ],
)
def test_an_import_from_a_lower_floor_is_fine(tmp_path: Path, path: str, text: str) -> None:
    assert plant(tmp_path, path, text) == []
