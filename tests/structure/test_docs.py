"""What the documents say of the code is so: numbers, layouts, codes, links, and the tests they name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from fastim import protocol
from fastim.dispatch.worker import _CODES
from fastim.model import Flag, Kind, SkipReason
from fastim.protocol import CloseCode, Op
from tests.vectors.notation import load

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "protocol.md").read_text()
DOCUMENTS: Final = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")])
SOURCES: Final = sorted(
    path for path in (ROOT / "fastim").rglob("*") if path.suffix in (".py", ".pyx", ".pxd", ".pyi")
)

ROW: Final = re.compile(r"^\| ([0-9]+) \| `(\w+)` \| ([^|]+) \| ([^|]*) \|", re.MULTILINE)
CODE_ROW: Final = re.compile(r"^\| `(\w+)` \| (yes|no) \|", re.MULTILINE)
LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
TEST_FILE: Final = re.compile(r"\b(?:tests|bench)/[\w/]+\.py\b")
HEX_LINE: Final = re.compile(r"^    ([0-9a-f]{4,})$", re.MULTILINE)


def section_of(op: Op) -> str:
    found = re.search(rf"^### {op.name} · {op.value}$(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/protocol.md has no section '### {op.name} · {op.value}'"
    return found[1]


def layout(kind: Any, first: int) -> list[tuple[int, str, bool]]:
    """(position, field, whether it has a default)"""
    fields = msgspec.structs.fields(kind)
    return [(number, field.name, not field.required) for number, field in enumerate(fields, first)]


# ------------------------------------------------------------------------------------ docs/protocol.md


@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
def test_every_frame_is_laid_out_in_the_page_as_in_the_code(op: Op) -> None:
    kind = protocol._FRAME_TYPES[op]
    expected = layout(kind, 1)
    for field in msgspec.structs.fields(kind):
        item = getattr(msgspec.inspect.type_info(field.type), "item_type", None)
        if isinstance(item, msgspec.inspect.StructType):
            expected += layout(item.cls, 0)
    rows = [
        (int(number), name, bool(default.strip())) for number, name, _, default in ROW.findall(section_of(op))
    ]
    assert rows == expected


def test_frames_stand_under_their_direction_and_reserved_ones_apart() -> None:
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    under = dict(zip(parts[1::2], parts[2::2], strict=True))
    names = {title: re.findall(r"^### (\w+) · ", text, re.MULTILINE) for title, text in under.items()}
    reserved = {Op[name] for name in names["Reserved frames"]}
    assert {Op[name] for name in names["Frames from the client"]} == {
        op for op in Op if op < 32 and op not in protocol.RESERVED
    }
    assert {op for op in reserved if op < 32} == protocol.RESERVED
    assert all(Op[name] >= 32 for name in names["Frames from the server"])


def test_every_close_code_is_in_the_table_with_what_a_client_does() -> None:
    rows = dict(re.findall(r"^\| ([0-9]{4}) \| (\w+ \| (?:yes|no)) \|", PAGE, re.MULTILINE))
    assert rows == {
        str(code.value): f"{code.name} | {'yes' if protocol.reconnects(code) else 'no'}" for code in CloseCode
    }


@pytest.mark.parametrize("enumeration", [Kind, Flag, SkipReason], ids=lambda kind: kind.__name__)
def test_every_kind_flag_and_reason_is_in_the_page(enumeration: Any) -> None:
    for member in enumeration:
        if member:
            assert re.search(rf"^\| {member.value} \| {member.name} \|", PAGE, re.MULTILINE), member


def test_the_limits_of_the_code_are_in_the_page() -> None:
    for limit in (
        protocol.MAX_PACKET_BYTES, protocol.MAX_SEND_BATCH, protocol.MAX_ACK_IDS, protocol.MAX_MENTIONS,
        protocol.MAX_HISTORY_LIMIT, protocol.MAX_FRAMES_PER_PACKET,
    ):  # fmt: skip
        assert re.search(rf"\b{limit:,}\b", PAGE), limit
    assert f"`{protocol.SUBPROTOCOL}`" in PAGE


def test_the_bytes_of_the_worked_example_are_golden() -> None:
    golden = {case["hex"]: case["name"] for case in load("frames")["frames"]}
    example = PAGE.partition("## A worked example")[2]
    shown = [golden.get(line, f"not a vector: {line}") for line in HEX_LINE.findall(example)]
    assert shown == [case["name"] for case in load("frames")["frames"] if case["name"].startswith("example-")]


# --------------------------------------------------------------------------------------- error codes


def codes_in(source: Path) -> Iterator[str]:
    """Literal first arguments of PeerError, and literal codes of Refusal."""
    if source.suffix == ".pyx":
        yield from re.findall(r'PeerError\("(\w+)"', source.read_text())
        return
    nodes = list(ast.walk(ast.parse(source.read_text())))
    places = {"PeerError": 0}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "fastim.bus.records":
            places |= {alias.name: 1 for alias in node.names if alias.name == "Refusal"}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            at = places.get(name)
            if at is not None and len(node.args) > at:
                code = node.args[at]
                if isinstance(code, ast.Constant) and isinstance(code.value, str):
                    yield code.value


def codes_used() -> dict[str, str]:
    """code -> a file that uses it."""
    used = {code: "fastim/dispatch/worker.py" for code, _ in _CODES.values()}
    for source in SOURCES:
        if source.suffix in (".py", ".pyx"):
            used |= {code: str(source.relative_to(ROOT)) for code in codes_in(source)}
    return used


def test_every_error_code_is_in_the_page() -> None:
    documented = {code for code, _ in CODE_ROW.findall(PAGE)}
    missing = {code: where for code, where in codes_used().items() if code not in documented}
    assert missing == {}


def test_the_page_has_no_error_code_that_nothing_uses() -> None:
    documented = {code for code, _ in CODE_ROW.findall(PAGE)}
    assert documented - set(codes_used()) == set()


# ------------------------------------------------------------------------------------ links and names


def heading_anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = document if not path else (document.parent / path).resolve()
        assert found.exists(), f"{target} does not exist"
        if anchor and found.suffix == ".md":
            assert anchor in heading_anchors(found.read_text()), f"no heading for {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    missing = [name for name in TEST_FILE.findall(document.read_text()) if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_a_module_names_exists(source: Path) -> None:
    missing = [name for name in TEST_FILE.findall(source.read_text()) if not (ROOT / name).exists()]
    assert missing == []


def test_every_decision_is_listed() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "adr" / "README.md").read_text()))
    assert listed == {path.name for path in (ROOT / "docs" / "adr").glob("[0-9]*.md")}


def test_every_decision_that_a_file_names_exists() -> None:
    numbers = {path.name[:4] for path in (ROOT / "docs" / "adr").glob("[0-9]*.md")}
    named = {
        number: str(source.relative_to(ROOT))
        for source in [*SOURCES, *DOCUMENTS, *(ROOT / "fastim").rglob("*.sql")]
        for number in re.findall(r"adr/([0-9]{4})", source.read_text())
    }
    assert {number: where for number, where in named.items() if number not in numbers} == {}
