"""Build the Cython extensions of fastim._core in a flavour chosen by FASTIM_BUILD.

release    default; optimised, no bounds checks. Built in place beside the sources.
debug      bounds, None and overflow checks, C asserts, live-object counters (FASTIM_DEBUG=1).
asan       debug under AddressSanitizer and UBSan.
coverage   debug with Cython line tracing.
echo       release whose connections send whole messages back: for the conformance suite (docs/adr/0041).

Flavours never mix: generated C, objects and, but for release, the finished package live in build/<flavour>/.
    FASTIM_BUILD=debug python setup.py build    a whole package (Python sources included) in build/debug/lib
    PYTHONPATH=build/debug/lib pytest ...       tests it; pytest is set up so that PYTHONPATH comes first
tests/conftest.py refuses to run when FASTIM_BUILD is set and another flavour was imported.
none       no extensions: the editable install of `make venv`, whose next step builds them.
Needs gcc and the Python headers, nothing else.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import distribution
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CORE = ROOT / "fastim" / "_core"

CHECKED = {
    "boundscheck": True,
    "wraparound": False,
    "nonecheck": True,
    "overflowcheck": True,
    "cdivision": False,
}
UNCHECKED = {"boundscheck": False, "wraparound": False, "nonecheck": False, "cdivision": True}
STRICT_C = [
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
    "-Wno-cast-function-type",
]

# name: (directives, C flags, linker flags, macros)
FLAVOURS: dict[str, tuple[dict[str, bool], list[str], list[str], dict[str, str]]] = {
    "release": (UNCHECKED, ["-O3", "-g1"], [], {"NDEBUG": "1"}),
    "debug": (CHECKED, ["-O1", "-g", "-UNDEBUG"], [], {"FASTIM_DEBUG": "1"}),
    "asan": (
        CHECKED,
        ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=undefined"],
        ["-fsanitize=address,undefined"],
        {"FASTIM_DEBUG": "1"},
    ),
    "coverage": (
        CHECKED | {"linetrace": True},
        ["-O0", "-g", "-UNDEBUG"],
        [],
        {"FASTIM_DEBUG": "1", "CYTHON_TRACE": "1"},
    ),
    "echo": (UNCHECKED, ["-O3", "-g1"], [], {"NDEBUG": "1", "FASTIM_ECHO": "1"}),
}  # fmt: skip

flavour = os.environ.get("FASTIM_BUILD") or "release"
if flavour not in (*FLAVOURS, "none"):
    sys.exit(f"FASTIM_BUILD is {flavour!r}; known: {', '.join(FLAVOURS)}, none")
build = Path("build") / flavour


def extensions() -> list[Extension]:
    if flavour == "none":
        return []
    _, c_flags, link_flags, macros = FLAVOURS[flavour]
    headers = [str(path.relative_to(ROOT)) for path in sorted(CORE.glob("*.pxd"))]
    # picows' .pxd is a memory layout; conn refuses at import another minor than it was built against.
    picows = distribution("picows")
    headers.append(str(picows.locate_file("picows/picows.pxd")))
    macros = macros | {"FASTIM_PICOWS": f'"{picows.version}"'}
    return [
        Extension(
            f"fastim._core.{source.stem}",
            [str(source.relative_to(ROOT))],
            depends=[*headers, "setup.py"],
            define_macros=[*macros.items()],
            extra_compile_args=[*c_flags, *STRICT_C],
            extra_link_args=link_flags,
        )
        for source in sorted(CORE.glob("*.pyx"))
    ]


class BuildCore(build_ext):
    """Translates when it builds, so that asking for metadata compiles nothing."""

    def run(self) -> None:
        # Directives are in this file, which Cython's own time stamps do not cover.
        generated = (ROOT / build / "c").rglob("*.c")
        recipe_changed = any(c.stat().st_mtime < Path(__file__).stat().st_mtime for c in generated)
        directives = FLAVOURS[flavour][0] if self.extensions else {}
        translated = cythonize(
            self.extensions,
            build_dir=str(build / "c"),
            force=recipe_changed,
            # No class of the core can be pickled, and there are no doctests to collect.
            compiler_directives={
                "language_level": 3,
                "auto_pickle": False,
                "autotestdict": False,
                **directives,
            },
        )
        for extension, c in zip(self.extensions, translated, strict=True):
            extension.sources = c.sources
        super().run()


def forget_deleted_modules() -> None:
    """build_py copies but never deletes: a module removed from the sources would still be imported."""
    lib = ROOT / build / "lib"
    for copy in lib.glob("fastim/**/*.py"):
        if not (ROOT / copy.relative_to(lib)).exists():
            copy.unlink()


forget_deleted_modules()
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCore},
    options={
        "build": {"build_base": str(build), "build_lib": str(build / "lib"), "build_temp": str(build / "o")},
        "build_ext": {"parallel": os.cpu_count() or 1},
    },
)
