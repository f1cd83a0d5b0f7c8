"""Memory presence keeps the presence contract; and what only it promises: no entry is left behind."""

from __future__ import annotations

from fastim.presence.base import PresenceStore
from fastim.presence.memory import MemoryPresence
from tests.contract.presence import PresenceContract


class HandClock:
    """Moves when told to."""

    def __init__(self) -> None:
        self.mono = 1_000
        self.wall = 1_790_000_000_000

    def mono_ms(self) -> int:
        return self.mono

    def wall_ms(self) -> int:
        return self.wall


class TestMemoryPresence(PresenceContract):
    def setup_method(self) -> None:
        self.clock = HandClock()

    def presence(self) -> PresenceStore:
        return MemoryPresence(self.clock)

    def peer(self, presence: PresenceStore) -> PresenceStore:
        return presence

    async def advance(self, ms: int) -> None:
        self.clock.mono += ms
        self.clock.wall += ms

    def wall_ms(self) -> int:
        return self.clock.wall

    async def test_generations_go_on_above_the_start_value(self) -> None:
        presence = MemoryPresence(self.clock, 7 << 32)
        await presence.open_lease("n1", 7, 1_000)
        attachment, _ = await presence.attach("alice", "phone", "app", "n1", 7, "s1")
        assert attachment.generation == 7 << 32

    async def test_a_jump_of_the_wall_clock_ends_no_lease(self) -> None:
        presence = MemoryPresence(self.clock)
        await presence.open_lease("n1", 1, 6_000)
        await presence.attach("alice", "phone", "app", "n1", 1, "s1")
        self.clock.wall += 10 * 365 * 86_400_000
        assert (await presence.locate(["alice"]))["alice"].attachments
        self.clock.wall -= 20 * 365 * 86_400_000
        assert (await presence.locate(["alice"]))["alice"].attachments

    async def test_a_grace_that_is_over_when_the_last_device_goes_is_forgotten_with_it(self) -> None:
        presence = MemoryPresence(self.clock)
        await presence.open_lease("n1", 1, 60_000)
        phone, _ = await presence.attach("alice", "phone", "app", "n1", 1, "s1")
        pad, _ = await presence.attach("alice", "pad", "pad", "n1", 1, "s2")
        await presence.detach("alice", "phone", phone.generation, self.clock.wall + 4_000)
        self.clock.wall += 4_000
        self.clock.mono += 3_999
        await presence.detach("alice", "pad", pad.generation)
        await self.advance(10_000)
        assert await presence.locate(["alice"]) == {}

    async def test_nothing_is_kept_of_users_who_left(self) -> None:
        presence = MemoryPresence(self.clock)
        await presence.open_lease("n1", 1, 60_000)
        for number in range(100):
            attachment, _ = await presence.attach(f"u{number}", "phone", "app", "n1", 1, "s")
            grace_ms = self.clock.wall + 4_000 if number % 2 else 0
            await presence.detach(f"u{number}", "phone", attachment.generation, grace_ms)
        await self.advance(5_000)
        assert await presence.locate([f"u{number}" for number in range(100)]) == {}
        assert presence.counts() == (0, 0, 0)

    async def test_nothing_is_kept_of_rooms_that_emptied(self) -> None:
        presence = MemoryPresence(self.clock)
        await presence.open_lease("n1", 1, 60_000)
        await presence.open_lease("n2", 1, 1_000)
        for number in range(100):
            await presence.enter(f"r{number}", "n1", 1, 3)
            await presence.enter(f"r{number}", "n2", 1, 1)
            await presence.leave(f"r{number}", "n1", 1)
        assert presence.counts() == (0, 0, 100)
        await self.advance(1_001)
        assert presence.counts() == (0, 0, 0)
