"""The slow twin of fastim.client.ordering: it keeps every frame that ever came and looks at all of them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Offer:
    from_seq: int
    to_seq: int
    item: str
    content: bool = True
    """False: only the seq was heard of."""


@dataclass
class Conv:
    epoch: int = 0
    last: int | None = None
    waiting: list[Offer] = field(default_factory=list)


class Ordering:
    """Returns (applied, done, reset) as sets of facts; `open_hole` is what a pull would ask for."""

    def __init__(self) -> None:
        self.convs: dict[str, Conv] = {}

    def load(self, conv: str, epoch: int, last: int) -> None:
        self.convs[conv] = Conv(epoch, last)

    def _enter(self, conv: str, epoch: int) -> tuple[Conv, list[str], bool]:
        state = self.convs.setdefault(conv, Conv(epoch))
        if epoch == 0 or state.epoch == epoch:
            return state, [], False
        known, state.epoch = state.epoch, epoch
        if known == 0:
            return state, [], False
        gone = [offer.item for offer in state.waiting]
        state.waiting = []
        if state.last is not None:
            state.last = 0
        return state, gone, True

    def offer(
        self, conv: str, epoch: int, from_seq: int, to_seq: int, item: str
    ) -> tuple[list[tuple[int, int, str]], set[str], bool]:
        state, gone, reset = self._enter(conv, epoch)
        if state.last is None and from_seq <= 1:
            state.last = 0
        state.waiting.append(Offer(from_seq, to_seq, item))
        applied, done = self._settle(state)
        return applied, {*gone, *done}, reset

    def heard(
        self, conv: str, epoch: int, seq: int, item: str
    ) -> tuple[list[tuple[int, int, str]], set[str], bool]:
        state, gone, reset = self._enter(conv, epoch)
        state.waiting.append(Offer(seq, seq, item, content=False))
        applied, done = self._settle(state)
        return applied, {*gone, *done}, reset

    def start(self, conv: str, epoch: int, cursor: int) -> tuple[list[tuple[int, int, str]], set[str], bool]:
        state, gone, reset = self._enter(conv, epoch)
        if state.last is None:
            held = [offer.from_seq for offer in state.waiting if offer.content]
            state.last = min([cursor, *(from_seq - 1 for from_seq in held)])
        applied, done = self._settle(state)
        return applied, {*gone, *done}, reset

    def _settle(self, state: Conv) -> tuple[list[tuple[int, int, str]], set[str]]:
        applied: list[tuple[int, int, str]] = []
        done: set[str] = set()
        if state.last is None:
            return applied, done
        while True:
            known = [offer for offer in state.waiting if offer.to_seq <= state.last]
            done.update(offer.item for offer in known)
            state.waiting = [offer for offer in state.waiting if offer.to_seq > state.last]
            fitting = [o for o in state.waiting if o.content and o.from_seq <= state.last + 1]
            if not fitting:
                return applied, done
            # The lowest start; of several, the one that came first.
            chosen = min(fitting, key=lambda offer: offer.from_seq)
            applied.append((state.last + 1, chosen.to_seq, chosen.item))
            state.last = chosen.to_seq
            state.waiting.remove(chosen)

    def lost(self) -> None:
        self.convs = {name: state for name, state in self.convs.items() if state.last is not None}
        for state in self.convs.values():
            state.waiting = []

    def hole(self, conv: str) -> tuple[int, int] | None:
        """(from_seq, to_seq) that is missing below what waits."""
        state = self.convs.get(conv)
        if state is None or not state.waiting:
            return None
        held = [offer.from_seq for offer in state.waiting if offer.content]
        end = min(held) - 1 if held else max(offer.to_seq for offer in state.waiting)
        return (state.last or 0) + 1, end
