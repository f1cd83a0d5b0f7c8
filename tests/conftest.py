"""What every test gets: a loop that forgives nothing, and a core that must be empty afterwards.

`async def` tests and the fixture `run(coro)` use a fresh uvloop. The test fails when the loop's exception
handler was called or a task outlives its test. On a debug build it also fails when a core object does.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import os
import pkgutil
import resource
import shutil
from collections.abc import Callable, Coroutine, Iterator
from types import ModuleType
from typing import Any, TypeVar

import pytest
import uvloop

import fastim._core
from tests import leaks
from tests.servers import Servers, SharedServers

T = TypeVar("T")


def counting_core_modules() -> list[ModuleType]:
    """The extensions of the core that count their live objects."""
    names = [module.name for module in pkgutil.iter_modules(fastim._core.__path__)]
    modules = [importlib.import_module(f"fastim._core.{name}") for name in names]
    return [module for module in modules if hasattr(module, "live")]


CORE = counting_core_modules()


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test one flavour of the core while another was asked for (see setup.py)."""
    config.pluginmanager.register(leaks, "tests.leaks")
    asked = os.environ.get("FASTIM_BUILD")
    if asked is None:
        return
    wrong = [module.__file__ for module in CORE if module.DEBUG is (asked == "release")]
    if wrong or not CORE:
        raise pytest.UsageError(f"FASTIM_BUILD={asked}, but imported: {wrong or fastim.__file__}")


def pytest_collection_finish() -> None:
    """What is loaded now stays: the collection after each test need not look at it again (0.1 s apiece)."""
    gc.collect()
    gc.freeze()


def live_core_objects() -> dict[str, int]:
    """Counters of the core that are not zero; always empty on a release build."""
    counts = {f"{core.__name__}.{name}": count for core in CORE for name, count in core.live().items()}
    return {name: count for name, count in counts.items() if count != 0}


@pytest.fixture(autouse=True)
def core_is_empty_afterwards() -> Iterator[None]:
    yield
    if live_core_objects():
        gc.collect()
    assert live_core_objects() == {}, "core objects outlived the test"


def run_on_fresh_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end; raise AssertionError for a called exception handler or a leaked task."""
    unhandled: list[dict[str, Any]] = []
    leaked: set[asyncio.Task[Any]] = set()

    async def watched() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: unhandled.append(context))
        try:
            return await main
        finally:
            leaked.update(asyncio.all_tasks() - {asyncio.current_task()})  # type: ignore[arg-type]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(watched())
    gc.collect()  # a future dropped with its exception reports only when it dies
    assert not leaked, f"tasks outlived the test: {sorted(task.get_name() for task in leaked)}"
    assert not unhandled, f"the loop's exception handler was called: {unhandled}"
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    run_on_fresh_loop(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, T]], T]:
    return run_on_fresh_loop


@pytest.fixture
def peak_kb() -> Callable[[], int]:
    """The most memory that this process ever held.

    Under AddressSanitizer always 0: its quarantine keeps what was freed, so its peak says nothing.
    """
    if os.environ.get("FASTIM_BUILD") == "asan":
        return lambda: 0
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture
def need() -> Callable[..., None]:
    """need("strace"), need("kafka", present=False): skip when absent, fail when FASTIM_REQUIRE names it."""

    def check(name: str, *, present: bool | None = None) -> None:
        if shutil.which(name) is not None if present is None else present:
            return
        if name in os.environ.get("FASTIM_REQUIRE", "").split(","):
            pytest.fail(f"{name} is required (FASTIM_REQUIRE) and was not found")
        pytest.skip(f"{name} was not found")

    return check


@pytest.fixture(scope="session")
def shared_servers() -> Iterator[SharedServers]:
    servers = SharedServers()
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def kafka(shared_servers: SharedServers) -> str:
    """kafka://host:port of a real broker; see tests/servers.py for when there is none."""
    return shared_servers.url("kafka")


@pytest.fixture(scope="session")
def postgres(shared_servers: SharedServers) -> str:
    """postgresql://... of a real server; its role may create databases."""
    return shared_servers.url("postgres")


@pytest.fixture(scope="session")
def redis_server(shared_servers: SharedServers) -> str:
    """redis://host:port/0 of a real server."""
    return shared_servers.url("redis")


@pytest.fixture(scope="session")
def valkey(shared_servers: SharedServers) -> str:
    """redis+cluster://host:port,host:port,host:port of a real cluster."""
    return shared_servers.url("valkey")


@pytest.fixture
def own_servers() -> Iterator[Servers]:
    """Servers for one test, to kill and to stop."""
    servers = Servers()
    try:
        yield servers
    finally:
        servers.close()
