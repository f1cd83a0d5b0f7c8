"""AES-256-GCM boxes with counter nonces, one object per key and direction.

    nonce = 4 bytes fixed per key | 8 bytes counter, 1 for the first frame; never random, never repeated
    box   = ciphertext | tag of 16 bytes; the header in front of it is associated data

Hides where AES and GHASH come from. pycryptodome compiles both (AES-NI, carry-less multiplication) into C
libraries that its own Python loads by symbol; the same symbols are looked up here and called by pointer: 0.13 µs
for 128 bytes against 46 through its API. The names are no public API, so at import they must agree with vectors of
NIST and with pycryptodome's own API; when anything differs, `cryptography` serves (0.43 µs) after one warning.

X1  a nonce is used once: the counter only grows, and a key ends after MAX_FRAMES_PER_KEY   tests/unit/test_cipher.py
X2  an Opener takes only the counter after the last, and nothing reaches the caller before the tag is proved   same
X3  both backends give the same bytes                                   tests/property/test_cipher_oracle.py
Source: NIST SP 800-38D; semantics, "Encryption".
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

from fastim._core cimport FASTIM_DEBUG

import ctypes
import hashlib
import warnings

from fastim.errors import PeerError, UsageError

DEBUG = bool(FASTIM_DEBUG)
cdef Py_ssize_t _live_keys = 0
cdef uint64_t MAX_COUNTER = (1LL << 53) - 1     # where the integers of the wire end

cdef enum:
    LANES = 32                  # counter blocks encrypted at once: 512 bytes on the stack

ctypedef int (*aes_start_t)(const uint8_t*, size_t, void**) noexcept nogil
ctypedef int (*ecb_start_t)(void*, void**) noexcept nogil
ctypedef int (*ecb_encrypt_t)(void*, const uint8_t*, uint8_t*, size_t) noexcept nogil
ctypedef int (*stop_t)(void*) noexcept nogil
ctypedef int (*ghash_expand_t)(const uint8_t*, void**) noexcept nogil
ctypedef int (*ghash_t)(uint8_t*, const uint8_t*, size_t, const uint8_t*, const void*) noexcept nogil

cdef aes_start_t _aes_start = NULL
cdef ecb_start_t _ecb_start = NULL
cdef ecb_encrypt_t _ecb_encrypt = NULL
cdef stop_t _ecb_stop = NULL
cdef stop_t _aes_stop = NULL
cdef ghash_expand_t _ghash_expand = NULL
cdef stop_t _ghash_destroy = NULL
cdef ghash_t _ghash = NULL
# The libraries stay loaded as long as their functions may be called.
_libraries = []


def live() -> dict[str, int]:
    """What is allocated now; zero unless DEBUG."""
    return {"keys": _live_keys}


cdef inline void _put_u64(uint8_t* out, uint64_t value) noexcept nogil:
    cdef int i
    for i in range(8):
        out[i] = <uint8_t>((value >> (56 - 8 * i)) & 0xFF)


cdef inline void _put_u32(uint8_t* out, uint32_t value) noexcept nogil:
    cdef int i
    for i in range(4):
        out[i] = <uint8_t>((value >> (24 - 8 * i)) & 0xFF)


cdef class Aead:
    """A key in one direction. backend: "pycryptodome", "cryptography", or "" for the better that works here.

    counter: of the frame before the first one under this key. frames: how many it is good for.
    """

    def __cinit__(
        self,
        bytes key not None,
        bytes prefix not None,
        *,
        str backend="",
        uint64_t counter=0,
        uint64_t frames=MAX_FRAMES_PER_KEY,
    ):
        global _live_keys
        cdef uint8_t[BLOCK_BYTES] zero
        cdef uint8_t[BLOCK_BYTES] subkey
        cdef void* aes = NULL
        if FASTIM_DEBUG:
            _live_keys += 1
        if PyBytes_GET_SIZE(key) != KEY_BYTES:
            raise UsageError(f"the key is {PyBytes_GET_SIZE(key)} bytes; must be {KEY_BYTES}")
        if PyBytes_GET_SIZE(prefix) != PREFIX_BYTES:
            raise UsageError(f"the nonce prefix is {PyBytes_GET_SIZE(prefix)} bytes; must be {PREFIX_BYTES}")
        if not 1 <= frames <= MAX_FRAMES_PER_KEY:
            raise UsageError(f"frames is {frames:,}; limits 1 and {MAX_FRAMES_PER_KEY:,}")
        memcpy(self._prefix, PyBytes_AS_STRING(prefix), PREFIX_BYTES)
        self.frames = frames
        self._end = frames
        self.start_c(counter)
        backend = backend or globals()["BACKEND"]
        if backend == "cryptography":
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            self._fallback = AESGCM(key)
            return
        if backend != "pycryptodome" or _ghash == NULL:
            raise UsageError(f"backend {backend!r} is not available")
        if _aes_start(<const uint8_t*>PyBytes_AS_STRING(key), KEY_BYTES, &aes) != 0:
            raise MemoryError()
        if _ecb_start(aes, &self._ecb) != 0:
            _aes_stop(aes)
            raise MemoryError()
        memset(zero, 0, BLOCK_BYTES)
        if _ecb_encrypt(self._ecb, zero, subkey, BLOCK_BYTES) != 0 or _ghash_expand(subkey, &self._hash_key) != 0:
            raise MemoryError()

    def __dealloc__(self):
        global _live_keys
        if self._ecb != NULL:
            _ecb_stop(self._ecb)
        if self._hash_key != NULL:
            _ghash_destroy(self._hash_key)
        if FASTIM_DEBUG:
            _live_keys -= 1

    @property
    def left(self) -> int:
        """Frames that this key is still good for."""
        return self._end - self.counter

    cdef int start_c(self, uint64_t counter) except -1:
        """Go on behind another key's last frame. Only before the first frame: or a nonce came twice."""
        if self._end - self.counter != self.frames:
            raise UsageError(f"the key has {self.counter + self.frames - self._end:,} frames; must be new")
        if counter > MAX_COUNTER - self.frames:
            raise UsageError(f"counter is {counter:,}; limit {MAX_COUNTER - self.frames:,}")
        self.counter = counter
        self._end = counter + self.frames
        return 0

    cdef void _nonce(self, uint8_t* out, uint64_t counter) noexcept nogil:
        memcpy(out, self._prefix, PREFIX_BYTES)
        _put_u64(out + PREFIX_BYTES, counter)

    cdef int _crypt(self, uint8_t* out, const uint8_t* nonce, const uint8_t* p, Py_ssize_t n) noexcept nogil:
        """out = p xor keystream from counter block 2 on; they may be the same memory. 0, or an error."""
        cdef uint8_t[LANES * BLOCK_BYTES] blocks
        cdef uint8_t[LANES * BLOCK_BYTES] stream
        cdef Py_ssize_t done = 0, part, i
        cdef uint32_t block = 2
        cdef int lanes, lane
        for lane in range(LANES):
            memcpy(blocks + lane * BLOCK_BYTES, nonce, 12)
        while done < n:
            part = n - done
            if part > LANES * BLOCK_BYTES:
                part = LANES * BLOCK_BYTES
            lanes = <int>((part + BLOCK_BYTES - 1) // BLOCK_BYTES)
            for lane in range(lanes):
                _put_u32(blocks + lane * BLOCK_BYTES + 12, block)
                block += 1
            if _ecb_encrypt(self._ecb, blocks, stream, <size_t>lanes * BLOCK_BYTES) != 0:
                return 1
            for i in range(part):
                out[done + i] = p[done + i] ^ stream[i]
            done += part
        return 0

    cdef int _tag(
        self, uint8_t* out, const uint8_t* nonce, const uint8_t* aad, Py_ssize_t aad_bytes,
        const uint8_t* box, Py_ssize_t n
    ) noexcept nogil:
        """The tag of a ciphertext. 0, or an error."""
        cdef uint8_t[BLOCK_BYTES] y
        cdef uint8_t[BLOCK_BYTES] block
        cdef uint8_t[BLOCK_BYTES] mask
        cdef int failed = 0, i
        memset(y, 0, BLOCK_BYTES)
        failed |= _hash_padded(y, aad, aad_bytes, self._hash_key)
        failed |= _hash_padded(y, box, n, self._hash_key)
        _put_u64(block, <uint64_t>aad_bytes * 8)
        _put_u64(block + 8, <uint64_t>n * 8)
        failed |= _ghash(y, block, BLOCK_BYTES, y, self._hash_key)
        memcpy(block, nonce, 12)
        _put_u32(block + 12, 1)
        failed |= _ecb_encrypt(self._ecb, block, mask, BLOCK_BYTES)
        for i in range(BLOCK_BYTES):
            out[i] = y[i] ^ mask[i]
        return failed


cdef int _hash_padded(uint8_t* y, const uint8_t* p, Py_ssize_t n, const void* key) noexcept nogil:
    cdef uint8_t[BLOCK_BYTES] last
    cdef Py_ssize_t whole = n - n % BLOCK_BYTES
    cdef int failed = 0
    if whole > 0:
        failed |= _ghash(y, p, <size_t>whole, y, key)
    if n > whole:
        memset(last, 0, BLOCK_BYTES)
        memcpy(last, p + whole, <size_t>(n - whole))
        failed |= _ghash(y, last, BLOCK_BYTES, y, key)
    return failed


cdef int _check_size(Py_ssize_t n) except -1:
    if n > MAX_SEALED_BYTES:
        raise UsageError(f"the content of a box is {n:,} bytes; limit {MAX_SEALED_BYTES:,}")
    return 0


@cython.final
cdef class Sealer(Aead):
    """Seals, each box under the next counter."""

    def seal(self, bytes aad not None, bytes data not None) -> bytes:
        """The box of `data`; `counter` is then what it was sealed under.

        Raises UsageError when the key has sealed `frames` frames.
        """
        cdef Py_ssize_t n = PyBytes_GET_SIZE(data)
        cdef bytes box = PyBytes_FromStringAndSize(NULL, n + TAG_BYTES)
        self.seal_c(
            <uint8_t*>PyBytes_AS_STRING(box), <const uint8_t*>PyBytes_AS_STRING(aad), PyBytes_GET_SIZE(aad),
            <const uint8_t*>PyBytes_AS_STRING(data), n,
        )
        return box

    cdef int seal_c(
        self, uint8_t* out, const uint8_t* aad, Py_ssize_t aad_bytes, const uint8_t* p, Py_ssize_t n
    ) except -1:
        """Write n + TAG_BYTES into `out`, which may be `p`."""
        cdef uint8_t[12] nonce
        cdef bytes box
        _check_size(n)
        if self.counter >= self._end:
            raise UsageError(f"the key has sealed {self.frames:,} frames; new keys are due at {REKEY_FRAMES:,}")
        # First: whatever happens below, this nonce is spent.
        self.counter += 1
        self._nonce(nonce, self.counter)
        if self._ecb == NULL:
            box = self._fallback.encrypt(
                PyBytes_FromStringAndSize(<char*>nonce, 12), PyBytes_FromStringAndSize(<const char*>p, n),
                PyBytes_FromStringAndSize(<const char*>aad, aad_bytes),
            )
            memcpy(out, PyBytes_AS_STRING(box), <size_t>(n + TAG_BYTES))
            return 0
        if self._crypt(out, nonce, p, n) != 0 or self._tag(out + n, nonce, aad, aad_bytes, out, n) != 0:
            raise MemoryError()
        return 0


@cython.final
cdef class Opener(Aead):
    """Opens, each box only under the counter after the last."""

    def open(self, uint64_t counter, bytes aad not None, bytes box not None) -> bytes:
        """The content of `box`.

        Raises PeerError("bad_seal") for another counter than the next, a key that has ended, a box of less than
        TAG_BYTES, a tag that does not fit; `counter` is then unchanged.
        """
        cdef Py_ssize_t n = PyBytes_GET_SIZE(box) - TAG_BYTES
        cdef bytes data = PyBytes_FromStringAndSize(NULL, n if n > 0 else 0)
        self.open_c(
            <uint8_t*>PyBytes_AS_STRING(data), counter, <const uint8_t*>PyBytes_AS_STRING(aad),
            PyBytes_GET_SIZE(aad), <const uint8_t*>PyBytes_AS_STRING(box), PyBytes_GET_SIZE(box),
        )
        return data

    cdef int open_c(
        self, uint8_t* out, uint64_t counter, const uint8_t* aad, Py_ssize_t aad_bytes, const uint8_t* box,
        Py_ssize_t n
    ) except -1:
        """Write n - TAG_BYTES into `out`, which may be `box`; nothing is written unless the tag fits."""
        cdef uint8_t[12] nonce
        cdef uint8_t[TAG_BYTES] tag
        cdef uint8_t difference = 0
        cdef bytes data
        cdef int i
        if counter != self.counter + 1:
            raise PeerError("bad_seal", f"counter is {counter:,}; must be {self.counter + 1:,}")
        if counter > self._end:
            raise PeerError("bad_seal", f"the key has opened {self.frames:,} frames; new keys are due")
        if n < TAG_BYTES:
            raise PeerError("bad_seal", f"the box is {n} bytes; at least {TAG_BYTES}")
        n -= TAG_BYTES
        _check_size(n)
        self._nonce(nonce, counter)
        if self._ecb == NULL:
            data = self._open_fallback(
                PyBytes_FromStringAndSize(<char*>nonce, 12),
                PyBytes_FromStringAndSize(<const char*>box, n + TAG_BYTES),
                PyBytes_FromStringAndSize(<const char*>aad, aad_bytes),
            )
            memcpy(out, PyBytes_AS_STRING(data), <size_t>n)
            self.counter = counter
            return 0
        if self._tag(tag, nonce, aad, aad_bytes, box, n) != 0:
            raise MemoryError()
        for i in range(TAG_BYTES):
            difference |= tag[i] ^ box[n + i]
        if difference != 0:
            raise PeerError("bad_seal", "the tag does not fit")
        if self._crypt(out, nonce, box, n) != 0:
            raise MemoryError()
        self.counter = counter
        return 0

    def _open_fallback(self, bytes nonce, bytes box, bytes aad):
        from cryptography.exceptions import InvalidTag

        try:
            return self._fallback.decrypt(nonce, box, aad)
        except InvalidTag:
            raise PeerError("bad_seal", "the tag does not fit") from None


# -------------------------------------------------------------------------------------------- where it comes from


def _address(library, str name):
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value


def _look_up() -> str:
    """Find pycryptodome's functions. Returns why not; empty: found."""
    global _aes_start, _aes_stop, _ecb_start, _ecb_encrypt, _ecb_stop, _ghash_expand, _ghash_destroy, _ghash
    try:
        import Crypto.Cipher
        import Crypto.Hash
    except ImportError:
        return "pycryptodome is not installed"
    try:
        aes = _load(Crypto.Cipher, "_raw_aesni")
        ecb = _load(Crypto.Cipher, "_raw_ecb")
        ghash = _load(Crypto.Hash, "_ghash_clmul")
        _aes_start = <aes_start_t><uintptr_t>_address(aes, "AESNI_start_operation")
        _aes_stop = <stop_t><uintptr_t>_address(aes, "AESNI_stop_operation")
        _ecb_start = <ecb_start_t><uintptr_t>_address(ecb, "ECB_start_operation")
        _ecb_encrypt = <ecb_encrypt_t><uintptr_t>_address(ecb, "ECB_encrypt")
        _ecb_stop = <stop_t><uintptr_t>_address(ecb, "ECB_stop_operation")
        _ghash_expand = <ghash_expand_t><uintptr_t>_address(ghash, "ghash_expand_clmul")
        _ghash_destroy = <stop_t><uintptr_t>_address(ghash, "ghash_destroy_clmul")
        _ghash = <ghash_t><uintptr_t>_address(ghash, "ghash_clmul")
    except (OSError, AttributeError) as error:
        return f"pycryptodome's compiled primitives were not found: {error}"
    return ""


def _load(package, str name):
    import pathlib

    for folder in package.__path__:
        for path in sorted(pathlib.Path(folder).glob(f"{name}.*")):
            if path.suffix in (".so", ".pyd"):
                library = ctypes.CDLL(str(path))
                _libraries.append(library)
                return library
    raise OSError(f"no {name} in {package.__name__}")


def _cpu_fits() -> bool:
    """Whether this processor has the instructions: pycryptodome's own question."""
    try:
        from Crypto.Util import _cpu_features
    except ImportError:
        return False
    return bool(_cpu_features.have_aes_ni() and _cpu_features.have_clmul())


# NIST GCM test cases 13-16 (AES-256): key, nonce, aad, plaintext, ciphertext | tag.
_VECTORS = (
    ("00" * 32, "00" * 12, "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
    ("00" * 32, "00" * 12, "", "00" * 16, "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"),
    (
        "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308", "cafebabefacedbaddecaf888",
        "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525"
        "b16aedf5aa0de657ba637b39",
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838"
        "c5f61e6393ba7a0abcc9f66276fc6ece0f4e1768cddf8853bb2d551b",
    ),
)


def _self_test() -> str:
    """Compare with NIST's vectors and with pycryptodome's public API. Returns what differs; empty: nothing."""
    from Crypto.Cipher import AES

    cdef Aead aead
    cases = [tuple(bytes.fromhex(text) for text in row) for row in _VECTORS]
    for size in (0, 1, 15, 16, 17, 511, 512, 513, 4_096):
        seed = hashlib.shake_256(size.to_bytes(4, "big")).digest(32 + 12 + 20 + size)
        key, nonce, aad, plain = seed[:32], seed[32:44], seed[44:64], seed[64:]
        made = AES.new(key, AES.MODE_GCM, nonce=nonce).update(aad).encrypt_and_digest(plain)
        cases.append((key, nonce, aad, plain, made[0] + made[1]))
    for key, nonce, aad, plain, wanted in cases:
        aead = Aead(key, nonce[:4], backend="pycryptodome")
        if _raw_seal(aead, nonce, aad, plain) != wanted:
            return f"a box of {len(plain)} bytes differs"
    return ""


cdef bytes _raw_seal(Aead aead, bytes nonce, bytes aad, bytes plain):
    """A box under any nonce, for the self-test only."""
    cdef Py_ssize_t n = PyBytes_GET_SIZE(plain)
    cdef bytes box = PyBytes_FromStringAndSize(NULL, n + TAG_BYTES)
    cdef uint8_t* out = <uint8_t*>PyBytes_AS_STRING(box)
    cdef const uint8_t* iv = <const uint8_t*>PyBytes_AS_STRING(nonce)
    aead._crypt(out, iv, <const uint8_t*>PyBytes_AS_STRING(plain), n)
    aead._tag(out + n, iv, <const uint8_t*>PyBytes_AS_STRING(aad), PyBytes_GET_SIZE(aad), out, n)
    return box


def _choose() -> str:
    trouble = "this processor has no AES or carry-less multiplication" if not _cpu_fits() else _look_up()
    if not trouble:
        try:
            trouble = _self_test()
        except (OSError, ValueError, AttributeError, ImportError, UsageError) as error:
            trouble = str(error)
    if trouble:
        warnings.warn(
            f"AES-GCM falls back to `cryptography`, about three times slower: {trouble}", RuntimeWarning, stacklevel=2
        )
        return "cryptography"
    return "pycryptodome"


BACKEND = _choose()
# The limits, for Python: names of a C enum are not attributes of the module.
globals().update(
    KEY_BYTES=KEY_BYTES, TAG_BYTES=TAG_BYTES, PREFIX_BYTES=PREFIX_BYTES, REKEY_FRAMES=REKEY_FRAMES,
    MAX_FRAMES_PER_KEY=MAX_FRAMES_PER_KEY,
)
