"""The REST interface: what may be asked, by whom, and what is answered.

Hides HTTP from the use cases and the use cases from HTTP: ENDPOINTS is the whole interface as a table, from
which routes, checks and the OpenAPI document are made. Every endpoint does: address not blocked, token,
authorise, shape, then one or two calls of store, presence or ingress.

R1  every error is problem+json with a code, and shows nothing of an exception    tests/system/test_rest.py
R2  the same authoriser as WebSocket decides; a token comes in the Authorization header only    same
R3  only failed tokens are limited per address    same
R4  a send that was not stored in time may be repeated under its client_id and is stored once    same
R5  on a durable bus it is answered 202 with where its trace is    same
Source: semantics, "Send"; architecture, "Processes".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from blacksheep import Application, Content, Request, Response, Router
from blacksheep.exceptions import MessageAborted
from blacksheep.settings.json import json_settings

from fastim.api import shapes
from fastim.api.ingress import Ingress
from fastim.api.openapi import Endpoint, document, path_pattern
from fastim.api.peers import address_behind, is_local
from fastim.api.problems import problem_response
from fastim.auth import Action, Identity, Verdict, authorise
from fastim.clock import Clock
from fastim.errors import InternalError, PeerError, Unavailable
from fastim.model import MAX_GROUP_MEMBERS, KindRule, check_id, client_id_text, parse_conv
from fastim.node.commands import SendRate
from fastim.node.upgrade import Address, Balancers, FailureLimit
from fastim.presence.base import NOWHERE, PresenceStore
from fastim.protocol import SendItem
from fastim.store.base import MessageStore

_log = logging.getLogger("fastim.api")

AWAY_RETRY_MS: Final = 2_000
MAX_PAGE_BYTES: Final = 1_048_576
"""Bodies in one page of history; the page ends earlier instead of growing."""
MAX_MSG_ID_DIGITS: Final = 16


class RestLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Named as in the configuration."""

    max_body_bytes: int = 262_144
    request_timeout_ms: int = 5_000
    origins: frozenset[str] = frozenset()


class Status:
    """What /health, /ready and /metrics tell; the app fills it in."""

    def __init__(self) -> None:
        self.draining = ""
        """Why this process ends; "" while it does not."""
        self.waiting_for: Callable[[], list[str]] = lambda: ["start"]
        """The parts that are not ready."""
        self.metrics: Callable[[], Awaitable[bytes]] = _no_metrics


async def _no_metrics() -> bytes:
    return b""


class Call:
    """One request on its way through an endpoint."""

    __slots__ = ("body", "client_id", "identity", "local", "path", "query")

    def __init__(self, path: Mapping[str, str], *, local: bool) -> None:
        self.path = path
        self.local = local
        self.identity: Identity | None = None
        self.query: Any = None
        self.body: Any = None
        self.client_id = ""

    @property
    def caller(self) -> Identity:
        if self.identity is None:
            raise PeerError("unauthenticated", "a bearer token is missing")
        return self.identity


Answer = msgspec.Struct | Response


class Rest:
    """The ASGI application.

    verify: a token's identity, or PeerError("unauthenticated"). rate: of people; services have none.
    """

    def __init__(
        self,
        *,
        store: MessageStore,
        presence: PresenceStore,
        ingress: Ingress,
        verify: Callable[[str], Identity],
        rate: SendRate,
        failures: FailureLimit,
        balancers: Balancers,
        clock: Clock,
        kinds: Mapping[int, KindRule],
        limits: RestLimits,
        status: Status,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._store = store
        self._presence = presence
        self._ingress = ingress
        self._verify = verify
        self._rate = rate
        self._failures = failures
        self._balancers = balancers
        self._clock = clock
        self._kinds = kinds
        self._limits = limits
        self._status = status
        self._on_fatal = on_fatal
        self._openapi = msgspec.json.encode(document(ENDPOINTS))
        self.application = self._build()

    async def start(self) -> None:
        await self.application.start()  # type: ignore[no-untyped-call]

    # --------------------------------------------------------------------------------------- the machinery

    def _build(self) -> Application:
        json_settings.use(  # type: ignore[no-untyped-call]
            loads=msgspec.json.decode, dumps=lambda value: msgspec.json.encode(value).decode()
        )
        router = Router()
        for endpoint in ENDPOINTS:
            for method in endpoint.methods:
                router.add(method, endpoint.path, self._route(endpoint))
        application = Application(router=router)
        application.show_error_details = False  # an environment variable could have set it
        # What a handler raises is answered below; BlackSheep would log every refusal with its address.
        application.logger.setLevel(logging.ERROR)

        async def otherwise(request: Request) -> Response:
            return self._finish(request, self._unknown(request))

        router.fallback = otherwise
        return application

    def _route(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        work: Callable[[Rest, Call], Awaitable[Answer]] = getattr(Rest, endpoint.name)
        spelling = path_pattern(endpoint.path)

        async def handle(request: Request) -> Response:
            # BlackSheep takes any case and a slash at the end; a rule of a proxy in front takes only one.
            if spelling.fullmatch(_path(request)) is None:
                return self._finish(request, self._unknown(request))
            path = {name: value or "" for name, value in (request.route_values or {}).items()}
            call = Call(path, local=is_local(request))
            try:
                await self._prepare(endpoint, call, request, address_behind(request, self._balancers))
                answer = await work(self, call)
                response = answer if isinstance(answer, Response) else _json(endpoint.status, answer)
            except Exception as error:
                response = self._failed(error, endpoint, call)
            return self._finish(request, response)

        return handle

    async def _prepare(
        self, endpoint: Endpoint, call: Call, request: Request, address: Address | None
    ) -> None:
        """Token, query and body. An endpoint that needs no token may still be given one."""
        token = _bearer(request)
        if endpoint.token or token:
            if address is not None and self._failures.blocked(address):
                raise PeerError(
                    "rate_limited", "too many failed tokens from this address", retryable=True,
                    retry_after_ms=5_000,
                )  # fmt: skip
            try:
                if not token:
                    raise PeerError("unauthenticated", "the Authorization header holds no bearer token")
                call.identity = self._verify(token)
            except PeerError:
                if address is not None:
                    self._failures.failed(address)
                raise
        call.query = _query(request, endpoint.query)
        if endpoint.body is not None:
            call.body = _decode(await self._read(request), endpoint.body)

    async def _read(self, request: Request) -> bytes:
        """The body, within its size and its time."""
        limit = self._limits.max_body_bytes
        media = (request.get_first_header(b"content-type") or b"application/json").split(b";")[0]
        if media.strip().lower() != b"application/json":
            raise PeerError("unsupported_media_type", "the body must be application/json")
        declared = request.get_first_header(b"content-length") or b"0"
        size = int(declared) if declared.isdigit() and len(declared) < 16 else 0
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.request_timeout_ms / 1000):
                async for part in request.stream():  # type: ignore[attr-defined]
                    parts.append(part)
                    size = max(size, sum(map(len, parts)))
                    if size > limit:
                        detail = f"the request body is {size:,} bytes or more; limit {limit:,}"
                        raise PeerError("too_big", f"{detail} (api.max_body_bytes)")
        except TimeoutError:
            ms = self._limits.request_timeout_ms
            detail = f"the body did not come within {ms:,} ms (api.request_timeout_ms)"
            raise PeerError("timeout", detail, retryable=True) from None
        return b"".join(parts)

    def _failed(self, error: Exception, endpoint: Endpoint, call: Call) -> Response:
        match error:
            case PeerError():
                pass
            case Unavailable():
                _log.warning("unavailable", extra={"endpoint": endpoint.name, "reason": str(error)})
                error = PeerError(
                    "unavailable", f"the {error.backend} cannot answer now", retryable=True,
                    retry_after_ms=AWAY_RETRY_MS,
                )  # fmt: skip
            case MessageAborted():
                return Response(400)  # nobody is there to read it
            case _:
                _log.error("a request failed", exc_info=error, extra={"endpoint": endpoint.name})
                if isinstance(error, InternalError):
                    self._on_fatal(error)
                error = PeerError("internal", "an error of the server's own; it was logged")
        return problem_response(error, call.client_id)

    def _unknown(self, request: Request) -> Response:
        """No such path, no such method, or a browser that asks first (CORS)."""
        path = _path(request)
        methods = sorted(
            {method for one in ENDPOINTS if path_pattern(one.path).fullmatch(path) for method in one.methods}
        )
        if not methods:
            return problem_response(PeerError("not_found", f"there is no {path[:200]!r} here"))
        allowed = ", ".join(methods).encode()
        wanted = request.get_first_header(b"access-control-request-method")
        if request.method == "OPTIONS" and wanted is not None and self._origin(request):
            headers = [
                (b"access-control-allow-methods", allowed),
                (b"access-control-allow-headers", b"authorization, content-type"),
                (b"access-control-max-age", b"600"),
            ]
            return Response(204, headers)
        detail = f"{request.method[:20]} is not possible here; {', '.join(methods)} is"
        response = problem_response(PeerError("method_not_allowed", detail))
        response.add_header(b"allow", allowed)
        return response

    def _origin(self, request: Request) -> bytes:
        """The origin of a browser that may read answers, else empty."""
        origin = request.get_first_header(b"origin") or b""
        return origin if origin.decode("latin-1") in self._limits.origins else b""

    def _finish(self, request: Request, response: Response) -> Response:
        response.add_header(b"cache-control", b"no-store")
        response.add_header(b"x-content-type-options", b"nosniff")
        if self._limits.origins:
            response.add_header(b"vary", b"origin")
            if origin := self._origin(request):
                response.add_header(b"access-control-allow-origin", origin)
                response.add_header(b"access-control-expose-headers", b"retry-after")
        return response

    # ----------------------------------------------------------------------------------------- operations

    async def health(self, call: Call) -> Answer:
        if self._status.draining:
            raise PeerError("draining", self._status.draining, retryable=True)
        return shapes.StatusAnswer("ok")

    async def ready(self, call: Call) -> Answer:
        if self._status.draining:
            raise PeerError("draining", self._status.draining, retryable=True)
        if absent := self._status.waiting_for():
            raise PeerError("not_ready", f"waiting for {', '.join(absent)}", retryable=True)
        return shapes.StatusAnswer("ready")

    async def metrics(self, call: Call) -> Answer:
        if not call.local:
            authorise(call.caller, Action.ADMIN)
        content = Content(b"text/plain; version=0.0.4; charset=utf-8", await self._status.metrics())
        return Response(200, None, content)

    async def openapi(self, call: Call) -> Answer:
        return Response(200, None, Content(b"application/json", self._openapi))

    # ------------------------------------------------------------------------------------------- messages

    async def send(self, call: Call) -> Answer:
        body: shapes.SendBody = call.body
        client_id = (
            shapes.read_client_id(body.client_id)
            if body.client_id
            else shapes.new_client_id(self._clock.wall_ms())
        )
        call.client_id = client_id_text(client_id)
        if self._status.draining:
            raise PeerError("draining", self._status.draining, retryable=True, retry_after_ms=AWAY_RETRY_MS)
        caller = call.caller
        if not body.sender and caller.is_service:
            raise PeerError("bad_request", "sender is missing: a service says on whose behalf it sends")
        sender = check_id("sender", body.sender or caller.user)
        authorise(caller, Action.SEND, conv=body.conv, user=sender)
        rule = shapes.read_kind(body.kind, self._kinds)
        content = shapes.read_content(body, rule)
        mentions = shapes.read_mentions(body.mentions)
        wait_ms = 0 if caller.is_service else self._rate.take(sender, 1)
        if wait_ms:
            detail = f"{sender} sends too fast (node.rate_per_s, node.rate_burst)"
            raise PeerError("rate_limited", detail, retryable=True, retry_after_ms=wait_ms)
        item = SendItem(client_id, rule.kind, content, body.loss_time_ms, body.flags, mentions)
        sent = await self._ingress.submit(body.conv, sender, item, service=caller.is_service)
        if sent is None:
            trace = f"/v1/messages/{call.client_id}/trace?sender={sender}"
            return _json(202, shapes.TakenAnswer(call.client_id, body.conv, trace))
        return shapes.SentAnswer(sent.msg_id, sent.seq, sent.ts_ms, call.client_id, body.conv)

    async def trace(self, call: Call) -> Answer:
        caller, query = call.caller, call.query
        all_of_it = _allowed(caller, Action.TRACE)
        user = check_id("user", query.user) if query.user else ""
        if not all_of_it:
            if user not in ("", caller.user):
                raise PeerError("forbidden", "trace is refused: the user is somebody else")
            user = caller.user
        message = await self._find(call.path["message"], caller, query.sender)
        unknown = PeerError(
            "not_found", f"no message {call.path['message'][:80]!r} that this token may trace"
        )
        if message is None:
            raise unknown
        if not all_of_it and not await self._shown_to(caller, message.conv, message.seq):
            raise unknown
        trace = await self._store.trace(message.msg_id, self._clock.wall_ms())
        if trace is None:
            raise unknown
        return shapes.show_trace(trace, self._kinds, user)

    async def _find(self, text: str, caller: Identity, sender: str) -> Any:
        if text.isascii() and text.isdigit() and len(text) <= MAX_MSG_ID_DIGITS:
            return await self._store.find(msg_id=int(text))
        client_id = shapes.read_client_id(text)
        if sender:
            return await self._store.find(client_id=client_id, sender=check_id("sender", sender))
        # Anybody can use anybody's client_id for a message of his own; the caller's own comes first.
        own = await self._store.find(client_id=client_id, sender=caller.user)
        return own or await self._store.find(client_id=client_id)

    async def _shown_to(self, caller: Identity, conv: str, seq: int) -> bool:
        try:
            verdict = authorise(caller, Action.READ, conv=conv)
        except PeerError:
            return False
        members = [] if verdict is Verdict.ALLOWED else await self._store.members(conv)
        return shapes.is_member_at(members, caller.user, parse_conv(conv), seq)

    async def history(self, call: Call) -> Answer:
        caller, query = call.caller, call.query
        conv = call.path["conv"]
        user = check_id("user", query.user) if query.user else caller.user
        authorise(caller, Action.READ, conv=conv, user=user)
        messages, more = await self._store.history(
            user,
            conv,
            before_seq=query.before_seq,
            after_seq=query.after_seq,
            from_ms=query.from_ms,
            to_ms=query.to_ms,
            limit=query.limit,
            now_ms=self._clock.wall_ms(),
        )
        kept = _within(messages, oldest=bool(query.after_seq))
        shown = [shapes.show_message(message, self._kinds) for message in kept]
        return shapes.HistoryAnswer(conv, shown, more or len(kept) < len(messages))

    # ---------------------------------------------------------------------------------------------- users

    async def conversations(self, call: Call) -> Answer:
        user = self._about(call)
        query = call.query
        page = await self._store.conversations(user, "", query.since, query.limit, self._clock.wall_ms())
        previews = _allowed(call.caller, Action.SELF, user=user)
        rows = [shapes.show_conversation(row, self._kinds, previews=previews) for row in page.items]
        return shapes.ConversationsAnswer(user, rows, page.version, page.more)

    async def online(self, call: Call) -> Answer:
        user = self._about(call)
        location = (await self._presence.locate([user])).get(user, NOWHERE)
        devices = [
            shapes.DeviceAnswer(one.device, one.device_class, one.since_ms) for one in location.attachments
        ]
        return shapes.OnlineAnswer(user, bool(devices), devices)

    async def unread(self, call: Call) -> Answer:
        user = self._about(call)
        conv = parse_conv(call.query.conv).name if call.query.conv else None
        badge, rows = await self._store.unread(user, conv)
        return shapes.UnreadAnswer(user, badge, [shapes.UnreadOf(name, count) for name, count in rows])

    def _about(self, call: Call) -> str:
        user = check_id("user", call.path["user"])
        authorise(call.caller, Action.LOOK, user=user)
        return user

    # --------------------------------------------------------------------------------------------- groups

    async def create_group(self, call: Call) -> Answer:
        authorise(call.caller, Action.GROUP)
        body: shapes.GroupBody = call.body
        group, owner = check_id("group", body.group), check_id("owner", body.owner)
        members = list(dict.fromkeys([owner, *(check_id("member", name) for name in body.members)]))
        if len(members) > MAX_GROUP_MEMBERS:
            detail = f"the group has {len(members)} members; limit {MAX_GROUP_MEMBERS}"
            raise PeerError("bad_request", detail)
        seq = await self._store.create_group(group, owner, members, self._clock.wall_ms())
        return shapes.GroupAnswer(group, f"g:{group}", seq)


# ------------------------------------------------------------------------------------------ pieces of HTTP


def _path(request: Request) -> str:
    """As it was asked for, still percent-encoded."""
    return request.url.path.decode("latin-1")


def _bearer(request: Request) -> str:
    """The token of the one Authorization header; empty if there is none or another scheme."""
    values = request.get_headers(b"authorization")
    if len(values) != 1:
        return ""
    scheme, _, token = values[0].decode("latin-1").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _query(request: Request, shape: type[shapes.Taken]) -> shapes.Taken:
    try:
        given = request.query
    except UnicodeDecodeError:
        raise PeerError("bad_request", "the query string is not UTF-8") from None
    for name, values in given.items():
        if len(values) > 1:
            raise PeerError("bad_request", f"the query has {name[:40]!r} {len(values)} times; once is enough")
    try:
        return msgspec.convert({name: values[0] for name, values in given.items()}, shape, strict=False)
    except msgspec.ValidationError as error:
        raise PeerError("bad_request", f"query: {error}") from None


def _decode(raw: bytes, shape: type[shapes.Taken]) -> shapes.Taken:
    try:
        return msgspec.json.decode(raw, type=shape)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise PeerError("bad_request", f"body: {error}") from None


def _json(status: int, answer: msgspec.Struct) -> Response:
    return Response(status, None, Content(b"application/json", msgspec.json.encode(answer)))


def _allowed(caller: Identity, action: Action, *, user: str | None = None) -> bool:
    try:
        return authorise(caller, action, user=user) is Verdict.ALLOWED
    except PeerError:
        return False


def _within(messages: Sequence[Any], *, oldest: bool) -> list[Any]:
    """As many as fit MAX_PAGE_BYTES, at least one, from the side where the page begins."""
    kept: list[Any] = []
    size = 0
    for message in messages if oldest else reversed(messages):
        size += len(message.body)
        if kept and size > MAX_PAGE_BYTES:
            break
        kept.append(message)
    return kept if oldest else kept[::-1]


_AUTH: Final = ("unauthenticated", "forbidden", "rate_limited")
_AWAY: Final = ("unavailable",)

ENDPOINTS: Final = (
    Endpoint("GET", "/health", "health", "Whether this process should get traffic.",
             answer=shapes.StatusAnswer, refusals=("draining",), head=True),
    Endpoint("GET", "/ready", "ready", "Whether every part of it works.",
             answer=shapes.StatusAnswer, refusals=("draining", "not_ready"), head=True),
    Endpoint("GET", "/metrics", "metrics", "Prometheus text; from this machine, or with an admin's token.",
             refusals=_AUTH),
    Endpoint("GET", "/openapi.json", "openapi", "This document."),
    Endpoint("POST", "/v1/messages", "send",
             "Send a message. Answered once it is stored for good; repeat a 503 under the same client_id. "
             "202, where processes share a durable bus: it is safe there and will be stored.", token=True,
             body=shapes.SendBody, answer=shapes.SentAnswer, status=201, taken=shapes.TakenAnswer,
             refusals=("bad_request", "bad_conv", "bad_id", "bad_client_id", "unknown_kind", *_AUTH,
                       "not_member", "unknown_user", "unknown_group", "conflict", "expired", "too_big",
                       "unsupported", *_AWAY)),
    Endpoint("GET", "/v1/messages/{message}/trace", "trace",
             "Where a message went, by msg_id or client_id: all of it for services and admins, his own part "
             "for a member.",
             token=True, query=shapes.TraceQuery, answer=shapes.TraceAnswer,
             refusals=("bad_request", "bad_client_id", *_AUTH, "not_found", *_AWAY)),
    Endpoint("GET", "/v1/conversations/{conv}/messages", "history",
             "A page of a conversation, for its members; an admin names as whom he reads.",
             token=True, query=shapes.HistoryQuery, answer=shapes.HistoryAnswer,
             refusals=("bad_request", "bad_conv", *_AUTH, *_AWAY)),
    Endpoint("GET", "/v1/users/{user}/conversations", "conversations",
             "The user's conversations, or what changed; for himself, services (without previews), admins.",
             token=True, query=shapes.ConversationsQuery, answer=shapes.ConversationsAnswer,
             refusals=("bad_request", "bad_id", *_AUTH, *_AWAY)),
    Endpoint("GET", "/v1/users/{user}/online", "online",
             "Where the user is connected now; for himself, services, admins.",
             token=True, answer=shapes.OnlineAnswer, refusals=("bad_id", *_AUTH, *_AWAY)),
    Endpoint("GET", "/v1/users/{user}/unread", "unread",
             "The user's badge and unread counts; for himself, services, admins.",
             token=True, query=shapes.UnreadQuery, answer=shapes.UnreadAnswer,
             refusals=("bad_request", "bad_id", "bad_conv", *_AUTH, *_AWAY)),
    Endpoint("POST", "/v1/groups", "create_group",
             "Make a group of at most 500; repeated, it gets the same answer. For services and admins.",
             token=True, body=shapes.GroupBody, answer=shapes.GroupAnswer, status=201,
             refusals=("bad_request", "bad_id", *_AUTH, "conflict", *_AWAY)),
)  # fmt: skip
