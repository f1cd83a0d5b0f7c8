"""`python -m tests.vectors.fill`: add the bytes of frames in frames.json that have none yet.

They come from the plain msgpack library, never from the codec that is held to them, and what is there already
is never touched: a golden frame that changes is a decision, made by hand.
"""

from __future__ import annotations

import json
from typing import Any

import msgpack

from tests.vectors.notation import FOLDER, enhex, expand, load


def write(name: str, content: dict[str, Any]) -> None:
    """One case a line, so that a change shows as that line."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in value)
            parts.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> None:
    content = load("frames")
    missing = [case for case in content["frames"] if "hex" not in case]
    for case in missing:
        case["hex"] = enhex(msgpack.packb([case["op"], *expand(case["values"])]))
        print(case["name"], case["hex"])
    if missing:
        write("frames", content)
    print(f"{len(missing)} filled")


if __name__ == "__main__":
    main()
