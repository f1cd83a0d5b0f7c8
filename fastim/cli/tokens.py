"""Tokens for people at a terminal: of the development key, or of a key file of their own."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fastim.auth import Algorithm, SigningKey, check_secret, create_dev_key, mint
from fastim.config import Config
from fastim.errors import PeerError, UsageError

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
DAY_S: Final = 86_400


def duration_s(text: str) -> int:
    """`90s`, `15m`, `12h`, `30d`, or a bare number of seconds. Raises UsageError."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text.strip())
    if found is None:
        raise UsageError(f"{text[:40]!r} is no length of time; write 90s, 15m, 12h or 30d")
    return int(found[1]) * _UNITS_S[found[2] or "s"]


def dev_key(config: Config) -> SigningKey:
    """The key that `serve --dev` made in the data directory. Never makes one: no server would believe it."""
    path = config.data_path / "dev-key.pem"
    if not path.exists():
        raise UsageError(f"{path} does not exist: start `fastim serve --dev` there, or give a token")
    try:
        return create_dev_key(config.data_path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a PEM private key"
        raise UsageError(f"{path}: {reason}") from None


def signing_key(config: Config, key_file: Path | None, issuer: str, kid: str) -> SigningKey:
    """The development key, or the one in key_file: a PEM Ed25519 key, else a secret for HS256."""
    if key_file is None:
        if issuer or kid:
            raise UsageError("--issuer and --kid go with --key-file")
        return dev_key(config)
    if not issuer or not kid:
        raise UsageError("--key-file needs --issuer and --kid, as the server's auth.issuers has them")
    try:
        content = key_file.read_bytes().strip()
    except OSError as error:
        raise UsageError(f"{key_file}: {error.strerror}") from None
    if not content.startswith(b"-----BEGIN"):
        return SigningKey(issuer, kid, Algorithm.HS256, check_secret(str(key_file), content))
    try:
        private = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError(f"{key_file} is not an unencrypted PEM private key") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise UsageError(f"{key_file} is a {type(private).__name__}; EdDSA needs Ed25519")
    return SigningKey(issuer, kid, Algorithm.EDDSA, private)


def mint_token(
    key: SigningKey, user: str, scopes: Iterable[str], *, audience: str, ttl_s: int, device: str = ""
) -> str:
    """Raises UsageError for a bad user, scope or length."""
    wanted = list(scopes)
    unknown = [scope for scope in wanted if scope not in ("client", "service", "admin")]
    if unknown:
        raise UsageError(f"the scope is {unknown[0]!r}; must be client, service or admin")
    try:
        return mint(key, user, wanted, audience=audience, ttl_s=ttl_s, now_s=int(time.time()), device=device)
    except PeerError as error:
        raise UsageError(error.detail) from None


def token_for(config: Config, given: str, user: str, *scopes: str) -> str:
    """The given token, else one of the development key, good for a day."""
    if given:
        return given.strip()
    return mint_token(dev_key(config), user, scopes, audience=config.auth.audience, ttl_s=DAY_S)
