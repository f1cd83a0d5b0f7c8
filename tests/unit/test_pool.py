"""ConnPool: which devices of which users are here."""

from __future__ import annotations

from fastim.auth import Identity, Scope
from fastim.node.pool import ConnPool
from fastim.node.session import Session


def session(name: str, user: str = "bob", device: str = "phone") -> Session:
    identity = Identity(user, frozenset({Scope.CLIENT}), 10**15, "test", name)
    return Session(name, identity, device, "app")


def test_a_session_is_found_by_id_by_user_and_by_device() -> None:
    pool = ConnPool()
    phone, laptop = session("a"), session("b", device="laptop")
    pool.add(phone)
    pool.add(laptop)
    assert pool.find("a") is phone
    assert pool.of_device("bob", "laptop") is laptop
    assert pool.of_user("bob") == {"phone": phone, "laptop": laptop}
    assert (len(pool), list(pool)) == (2, [phone, laptop])


def test_nobody_is_found_where_nobody_is() -> None:
    pool = ConnPool()
    assert pool.find("a") is None
    assert pool.of_device("bob", "phone") is None
    assert pool.of_user("bob") == {}
    assert pool.expired(10**9) == []


def test_a_removed_session_leaves_nothing_behind() -> None:
    pool = ConnPool()
    phone, laptop = session("a"), session("b", device="laptop")
    pool.add(phone)
    pool.add(laptop)
    pool.detached(phone, 5)
    pool.remove(phone)
    assert (pool.of_user("bob"), pool.find("a"), pool.expired(10)) == ({"laptop": laptop}, None, [])
    pool.remove(laptop)
    pool.remove(laptop)
    assert (len(pool), pool._by_user, pool._detached, pool.connections) == (0, {}, {}, 0)


def test_removing_an_older_session_does_not_touch_the_device_s_newer_one() -> None:
    pool = ConnPool()
    older, newer = session("a"), session("b")
    pool.add(older)
    pool.add(newer)
    pool.remove(older)
    assert pool.of_device("bob", "phone") is newer


def test_sessions_expire_in_the_order_in_which_they_lost_their_connection() -> None:
    pool = ConnPool()
    sessions = [session(name, user=name) for name in "abcd"]
    for one in sessions:
        pool.add(one)
    for moment, one in zip((10, 20, 20, 30), sessions, strict=True):
        pool.detached(one, moment)
    assert [one.id for one in pool.expired(9)] == []
    assert [one.id for one in pool.expired(20)] == ["a", "b", "c"]
    assert pool.connections == 0


def test_a_session_with_a_connection_again_waits_anew_when_it_loses_it() -> None:
    pool = ConnPool()
    first, second = session("a"), session("b", user="carol")
    for one in (first, second):
        pool.add(one)
        pool.detached(one, 10)
    pool.attached(first)
    assert (pool.connections, [one.id for one in pool.expired(50)]) == (1, ["b"])
    pool.detached(first, 60)
    assert [one.id for one in pool.expired(60)] == ["b", "a"]


def test_sessions_may_be_removed_while_the_pool_is_walked() -> None:
    pool = ConnPool()
    for name in "abc":
        pool.add(session(name, user=name))
    for one in pool:
        pool.remove(one)
    assert len(pool) == 0
