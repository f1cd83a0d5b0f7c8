"""Both backends against pycryptodome's public API, the slow twin that never ships."""

from __future__ import annotations

from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from fastim._core.cipher import BACKEND, MAX_FRAMES_PER_KEY, Opener, Sealer


def oracle(key: bytes, nonce: bytes, aad: bytes, data: bytes) -> bytes:
    cipher = AES.new(key, AES.MODE_GCM, nonce=nonce)
    cipher.update(aad)
    box, tag = cipher.encrypt_and_digest(data)
    return box + tag


@settings(max_examples=300, deadline=None)
@given(
    key=st.binary(min_size=32, max_size=32),
    prefix=st.binary(min_size=4, max_size=4),
    counter=st.integers(0, MAX_FRAMES_PER_KEY - 2),
    aad=st.binary(max_size=80),
    data=st.binary(max_size=2_100),
)
def test_a_box_is_the_oracles(key: bytes, prefix: bytes, counter: int, aad: bytes, data: bytes) -> None:
    wanted = oracle(key, prefix + (counter + 1).to_bytes(8, "big"), aad, data)
    for backend in {BACKEND, "cryptography"}:
        assert Sealer(key, prefix, backend=backend, counter=counter).seal(aad, data) == wanted
        assert Opener(key, prefix, backend=backend, counter=counter).open(counter + 1, aad, wanted) == data
