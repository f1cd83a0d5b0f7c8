"""The command line: `fastim serve`, and what a person needs beside it.

    serve token send chat          run it, talk to it
    node dispatch api              run a part of it, as one process of several
    why audit health doctor        what became of a message, of all of them, of the server, of its backends
    genconfig checkconfig version

This file only declares; the work is in the other files of the package, imported when it is asked for, so that
`fastim version` costs no server. Whoever makes a mistake is told in a sentence: exit 2 for what was typed or
configured, 1 for what went wrong.

L1  no mistake of a person ends in a traceback    tests/system/test_cli.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

app: Final = typer.Typer(
    name="fastim",
    help="Instant messaging in which nothing accepted is lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[Path | None, typer.Option("--config", "-c", envvar="FASTIM_CONFIG", help="The TOML file.")]
Data = Annotated[Path | None, typer.Option("--data", help="The data directory.  [default: fastim-data]")]
Token = Annotated[
    str,
    typer.Option(envvar="FASTIM_TOKEN", help="Instead of one of the development key.", show_default=False),
]
Url = Annotated[
    str, typer.Option("--url", help="Of the server.  [default: as configured]", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


Dev = Annotated[bool, typer.Option("--dev", help="Own keys, own certificate, two users.")]
Listen = Annotated[str, typer.Option(help="host:port for WebSocket clients.", show_default=False)]
ApiListen = Annotated[str, typer.Option(help="host:port for REST.", show_default=False)]
StatusListen = Annotated[
    str, typer.Option(help="host:port for /health, /ready and /metrics.", show_default=False)
]
Plain = Annotated[bool, typer.Option("--plain", help="ws without TLS; with --dev, on loopback.")]
LogLevel = Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.", show_default=False)]
Name = Annotated[str, typer.Option(help="Of this process, unlike any other's.", show_default=False)]


@app.command()
def serve(
    config: Config = None, data: Data = None, dev: Dev = False, listen: Listen = "",
    api_listen: ApiListen = "", plain: Plain = False, log_level: LogLevel = "",
) -> None:  # fmt: skip
    """Run everything in one process."""
    from fastim.cli.serving import run

    flags = {
        "dev": dev or None,
        "data_dir": str(data) if data else None,
        "node.listen": listen or None,
        "node.plain": plain or None,
        "api.listen": api_listen or None,
        "log.level": log_level.upper() or None,
    }
    raise typer.Exit(run(flags, config))


@app.command()
def node(
    config: Config = None, data: Data = None, dev: Dev = False, name: Name = "", listen: Listen = "",
    workers: Annotated[
        int | None, typer.Option(help="Nodes on this address, a process each.", show_default=False)
    ] = None,
    status_listen: StatusListen = "", plain: Plain = False, log_level: LogLevel = "",
    worker: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:  # fmt: skip
    """Run an access node: clients connect to it. Needs Kafka, Redis and PostgreSQL."""
    from fastim.cli.serving import run_node

    flags = {
        "dev": dev or None,
        "data_dir": str(data) if data else None,
        "node.name": name or None,
        "node.listen": listen or None,
        "node.workers": workers,
        "node.status_listen": status_listen or None,
        "node.plain": plain or None,
        "log.level": log_level.upper() or None,
    }
    raise typer.Exit(run_node(flags, config, worker))


@app.command()
def dispatch(
    config: Config = None, data: Data = None, dev: Dev = False, name: Name = "",
    status_listen: StatusListen = "", log_level: LogLevel = "",
) -> None:  # fmt: skip
    """Run a dispatcher: it stores, routes, tries again, pushes. Needs Kafka, Redis and PostgreSQL."""
    from fastim.cli.serving import run

    flags = {
        "dev": dev or None,
        "data_dir": str(data) if data else None,
        "dispatch.name": name or None,
        "dispatch.status_listen": status_listen or None,
        "log.level": log_level.upper() or None,
    }
    raise typer.Exit(run(flags, config, "dispatch"))


@app.command()
def api(
    config: Config = None, data: Data = None, dev: Dev = False, name: Name = "", listen: ApiListen = "",
    log_level: LogLevel = "",
) -> None:  # fmt: skip
    """Run the REST interface. Needs Kafka, Redis and PostgreSQL."""
    from fastim.cli.serving import run

    flags = {
        "dev": dev or None,
        "data_dir": str(data) if data else None,
        "api.name": name or None,
        "api.listen": listen or None,
        "log.level": log_level.upper() or None,
    }
    raise typer.Exit(run(flags, config, "api"))


@app.command()
def token(
    user: Annotated[str, typer.Argument(metavar="USER", help="Whom it speaks for.")],
    scope: Annotated[list[str] | None, typer.Option(help="client, service or admin.")] = None,
    ttl: Annotated[str, typer.Option(help="How long it is good: 90s, 15m, 12h, 30d.")] = "24h",
    device: Annotated[str, typer.Option(help="The only device that may use it.", show_default=False)] = "",
    key_file: Annotated[
        Path | None, typer.Option(help="A key of your own: PEM (Ed25519), or a secret (HS256).")
    ] = None,
    issuer: Annotated[str, typer.Option(help="iss, with --key-file.", show_default=False)] = "",
    kid: Annotated[str, typer.Option(help="kid, with --key-file.", show_default=False)] = "",
    config: Config = None,
    data: Data = None,
) -> None:
    """Print an access token."""
    from fastim.cli.tokens import duration_s, mint_token, signing_key
    from fastim.cli.where import client_config

    found = client_config(config, data)
    key = signing_key(found, key_file, issuer, kid)
    scopes = scope or ["client"]
    print(mint_token(key, user, scopes, audience=found.auth.audience, ttl_s=duration_s(ttl), device=device))


@app.command()
def send(
    to: Annotated[
        str, typer.Argument(metavar="TO", help="A user, or a conversation: p:a:b, g:group, s:user.")
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to say.")],
    sender: Annotated[str, typer.Option("--as", help="Who says it.", show_default=False)] = "",
    service: Annotated[
        bool, typer.Option("--service", help="As a service: to anybody, also s: conversations.")
    ] = False,
    client_id: Annotated[
        str, typer.Option(help="To repeat a send: the one it printed.", show_default=False)
    ] = "",
    expires: Annotated[
        str, typer.Option(help="Never shown after so long: 30s, 5m, 1h.", show_default=False)
    ] = "",
    token: Token = "",
    url: Url = "",
    config: Config = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Send one message over REST and print its ids."""
    from fastim.cli.remote import send_message
    from fastim.cli.where import client_config

    send_message(
        client_config(config, data), to, text, sender=sender, service=service, client_id=client_id,
        expires=expires, token=token, url=url, as_json=as_json,
    )  # fmt: skip


@app.command()
def chat(
    user: Annotated[str, typer.Argument(metavar="USER", help="Who you are.")],
    to: Annotated[
        str,
        typer.Argument(
            metavar="TO", help="Open this conversation, or the one with this user.", show_default=False
        ),
    ] = "",
    url: Url = "",
    token: Token = "",
    ca: Annotated[
        Path | None, typer.Option(help="Certificates to trust.  [default: the development server's]")
    ] = None,
    seal: Annotated[
        str,
        typer.Option(help="Seal towards this key: name:hex, as the server prints it.", show_default=False),
    ] = "",
    device: Annotated[str, typer.Option(help="Id of this installation.")] = "terminal",
    store: Annotated[Path | None, typer.Option(help="File in which this device keeps its messages.")] = None,
    config: Config = None,
    data: Data = None,
) -> None:
    """Talk at the terminal: conversations, history, sent and read marks."""
    from fastim.cli.chat import run_chat
    from fastim.cli.where import client_config

    found = client_config(config, data)
    raise typer.Exit(
        run_chat(found, user, to=to, token=token, url=url, ca=ca, seal=seal, device=device, store=store)
    )


@app.command()
def why(
    message: Annotated[str, typer.Argument(metavar="MSG_ID|CLIENT_ID")],
    user: Annotated[
        str, typer.Argument(metavar="USER", help="Only this user's part.", show_default=False)
    ] = "",
    url: Annotated[
        str, typer.Option(help="Ask a server over REST instead of reading --data.", show_default=False)
    ] = "",
    token: Token = "",
    config: Config = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Where a message went: who has it, what waits, what was tried."""
    from fastim.cli.ledger import explain
    from fastim.cli.where import client_config

    explain(client_config(config, data), message, user, url=url, token=token, as_json=as_json)


@app.command()
def audit(
    data: Data = None,
    config: Config = None,
    as_json: AsJson = False,
    ids: Annotated[
        Path | None, typer.Option(help="Also write every obligation to this file, a JSON object a line.")
    ] = None,
) -> None:
    """Account for every message and every user it was for. Exit 1 if one is lost."""
    from fastim.cli.ledger import run_audit
    from fastim.cli.where import client_config

    raise typer.Exit(run_audit(client_config(config, data), as_json=as_json, ids=ids))


@app.command()
def genconfig(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a new file.")] = None,
) -> None:
    """Print a configuration file with every key and its default."""
    from fastim.config import template
    from fastim.errors import UsageError

    if output is None:
        print(template(), end="")
        return
    try:
        with output.open("x") as file:
            file.write(template())
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror}") from None


@app.command()
def checkconfig(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The TOML file.")],
    role: Annotated[
        Literal["serve", "node", "dispatch", "api"], typer.Option("--for", help="Which process it is for.")
    ] = "serve",
) -> None:
    """Say what is wrong with a configuration file."""
    from fastim.config import load

    found = load({}, file, role)
    mode = "development" if found.dev else "production"
    print(f"{file} is good ({mode}: node on {found.node.listen}, REST on {found.api.listen})")


@app.command()
def health(url: Url = "", config: Config = None, data: Data = None, as_json: AsJson = False) -> None:
    """Ask a server whether it is alive and ready. Exit 1 if it is not."""
    from fastim.cli.remote import ask_health
    from fastim.cli.where import client_config

    raise typer.Exit(ask_health(client_config(config, data), url=url, as_json=as_json))


@app.command()
def doctor(
    config: Config = None, data: Data = None, dev: Dev = False,
    role: Annotated[
        Literal["serve", "node", "dispatch", "api"], typer.Option("--for", help="Which process it is for.")
    ] = "serve",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Look at what a process needs: this machine, Kafka, Redis, PostgreSQL. Exit 1 if one is bad."""
    from fastim.cli.doctor import run_doctor

    flags: dict[str, Any] = {"dev": True} if dev else {}
    if data is not None:
        flags["data_dir"] = str(data)
    raise typer.Exit(run_doctor(flags, config, role, as_json=as_json))


@app.command()
def version() -> None:
    """Print the version."""
    import fastim

    print(f"fastim {fastim.__version__}")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; does not return."""
    from fastim.errors import FastimError, UsageError

    options: dict[str, Any] = {} if arguments is None else {"args": arguments}
    try:
        app(**options)
    except UsageError as error:
        _complain(*getattr(error, "problems", (str(error),)))
        sys.exit(2)
    except FastimError as error:
        _complain(str(error))
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _complain(*sentences: str) -> None:
    for sentence in sentences:
        print(f"fastim: {sentence}", file=sys.stderr)
