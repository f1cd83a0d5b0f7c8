"""Which tagged frames of a session arrived, which are stored, and up to where all of them are.

T1  floor never passes a tag whose frame is not stored            tests/unit/test_client_tags.py
T2  a tag that is missing between two others is noticed           same
"""

from __future__ import annotations


class Tags:
    """Tags are consecutive in a session, but for what a hot resume leaves out and unknown frames carried."""

    def __init__(self, floor: int) -> None:
        self.floor = floor
        """Every frame up to this tag is stored."""
        self.seen = floor
        self._open: dict[int, bool] = {}
        """tag -> stored, above the floor, in order."""
        self._replaying = False
        self._unknown = 0
        self._quiet = True

    def begin(self, floor: int, *, hot: bool) -> None:
        """A connection. hot: frames above the floor come again, without those that need no ack any more."""
        self.floor = floor
        self.seen = floor
        self._open.clear()
        self._replaying = hot
        self._unknown = 0
        self._quiet = True

    def received(self, tag: int) -> bool:
        """A frame with this tag came; 0 wants no ack. False: a frame between was lost."""
        self._quiet = False
        if tag <= self.floor:
            return True
        missing = tag - self.seen - 1
        if missing > 0 and not self._replaying:
            if missing > self._unknown:
                return False
            for lost in range(self.seen + 1, tag):
                self._open[lost] = True
        self._unknown = 0
        self.seen = max(self.seen, tag)
        self._open.setdefault(tag, False)
        return True

    def stored(self, tag: int) -> None:
        """The frame with this tag needs nothing any more."""
        if tag in self._open:
            self._open[tag] = True
            for first, done in list(self._open.items()):
                if not done:
                    break
                self.floor = first
                del self._open[first]

    def unknown(self) -> None:
        """A frame of an op from the future: it may have had a tag, and needs nothing."""
        self._unknown += 1

    def complete(self, last_tag: int) -> bool:
        """The server says what it sent last. False: the end of it was lost."""
        if self._replaying:
            # Everything that was replayed has come before this answer.
            self._replaying = False
            self.seen = max(self.seen, last_tag)
            return True
        if last_tag > self.seen and last_tag - self.seen <= self._unknown:
            for lost in range(self.seen + 1, last_tag + 1):
                self._open[lost] = True
            self.seen = last_tag
            self._unknown = 0
            self.stored(last_tag)
        return last_tag <= self.seen

    def quiet(self) -> bool:
        """Whether no tagged frame came since the last question."""
        quiet, self._quiet = self._quiet, True
        return quiet
