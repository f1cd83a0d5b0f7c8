"""What every module of the core shares: whether this build counts and checks."""

cdef extern from *:
    """
    #ifndef FASTIM_DEBUG
    #define FASTIM_DEBUG 0
    #endif
    """
    # A macro, so `if FASTIM_DEBUG:` costs nothing in release: the C compiler drops the branch.
    enum: FASTIM_DEBUG
