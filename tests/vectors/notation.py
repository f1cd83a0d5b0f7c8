"""Read the golden vectors: expand the notation that README.md beside this file describes.

Nothing here knows a frame: the vectors are data, and what they are compared with is somebody else's business.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parent
_REPEAT: Final = re.compile(r"\(([0-9a-f]+)\*([0-9]+)\)")
_LEAST_FOLDED: Final = 40


def load(name: str) -> Any:
    """A vector file, as it is written."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def unhex(text: str) -> bytes:
    """`c403(78*3)` -> c4 03 78 78 78."""
    return bytes.fromhex(_REPEAT.sub(lambda found: found[1] * int(found[2]), text))


def enhex(data: bytes) -> str:
    """The reverse: hex in which long runs of one byte are folded."""
    out = []
    for byte, run in itertools.groupby(data):
        length = len(list(run))
        out.append(f"({byte:02x}*{length})" if length >= _LEAST_FOLDED else f"{byte:02x}" * length)
    return "".join(out)


def expand(value: Any) -> Any:
    """The value that the notation stands for."""
    if isinstance(value, list):
        return [expand(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if "bin" in value:
        return bytes.fromhex(value["bin"]) * value.get("times", 1)
    if "text" in value:
        return value["text"] * value["times"]
    if "list" in value:
        return [expand(inner) for inner in value["list"]] * value["times"]
    if value.keys() == {"from", "to"}:
        return list(range(value["from"], value["to"] + 1))
    return {name: expand(inner) for name, inner in value.items()}
