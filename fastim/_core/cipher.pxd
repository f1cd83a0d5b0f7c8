# AES-256-GCM with counter nonces: one key, one direction. See cipher.pyx.

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum:
    KEY_BYTES = 32
    TAG_BYTES = 16
    BLOCK_BYTES = 16
    PREFIX_BYTES = 4            # of a nonce; the 8 bytes of the counter follow, big-endian
    MAX_SEALED_BYTES = 1_048_576    # of one box; a frame is 64 KiB
    REKEY_FRAMES = 16_777_216       # new keys are due ...
    MAX_FRAMES_PER_KEY = 33_554_432 # ... and without them sealing ends here


cdef class Aead:
    cdef:
        void* _ecb              # pycryptodome's; NULL: _fallback is used
        void* _hash_key
        object _fallback
        uint8_t[PREFIX_BYTES] _prefix
        readonly uint64_t counter   # of the newest frame; the first has 1, whatever key it is under
        readonly uint64_t frames    # so many under this key, then it has ended
        uint64_t _end               # the counter of the last of them

    cdef int start_c(self, uint64_t counter) except -1
    cdef void _nonce(self, uint8_t* out, uint64_t counter) noexcept nogil
    cdef int _tag(
        self, uint8_t* out, const uint8_t* nonce, const uint8_t* aad, Py_ssize_t aad_bytes,
        const uint8_t* box, Py_ssize_t n
    ) noexcept nogil
    cdef int _crypt(self, uint8_t* out, const uint8_t* nonce, const uint8_t* p, Py_ssize_t n) noexcept nogil


@cython.final
cdef class Sealer(Aead):
    cdef int seal_c(
        self, uint8_t* out, const uint8_t* aad, Py_ssize_t aad_bytes, const uint8_t* p, Py_ssize_t n
    ) except -1


@cython.final
cdef class Opener(Aead):
    cdef int open_c(
        self, uint8_t* out, uint64_t counter, const uint8_t* aad, Py_ssize_t aad_bytes, const uint8_t* box,
        Py_ssize_t n
    ) except -1
