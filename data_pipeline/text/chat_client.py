"""Sends many requests to one OpenAI-compatible endpoint, a bounded number at once, and caches every reply."""

import asyncio
import dataclasses
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import openai
from tqdm import tqdm

from data_pipeline.common.errors import UserError

GIVE_UP_AFTER = 20  # failures of the endpoint (not of a request) in a row
MOST_TOKENS = 10**9  # of a request or a reply; a larger count of an endpoint is a mistake

Key = TypeVar("Key")
Request = dict[str, Any]  # the body of POST /chat/completions: "model", "messages", "temperature", …


@dataclasses.dataclass(frozen=True)
class Reply:
    """A model's reply. model: the name that the endpoint reports."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no reply."""

    reason: str


@dataclasses.dataclass
class Statistics:
    """The work of `ask_all`: numbers of requests, and tokens of the sent requests as the endpoint counts them."""

    cached: int = 0
    answered: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    models: dict[str, int] = dataclasses.field(default_factory=dict)  # replies by Reply.model, cached ones too
    stopped: str | None = None  # why requests were left unasked

    def add(self, other: "Statistics") -> None:
        """Adds the numbers of another `ask_all`."""
        for field in ("cached", "answered", "failed", "retries", "prompt_tokens", "completion_tokens"):
            setattr(self, field, getattr(self, field) + getattr(other, field))
        for model, replies in other.models.items():
            self.models[model] = self.models.get(model, 0) + replies
        self.stopped = self.stopped or other.stopped


class ReplyCache:
    """A sqlite file of replies by request, for one process at a time. A reply is on disk when `put` returns."""

    def __init__(self, path: Path):
        self.path = path
        try:
            if path != Path(":memory:"):
                path.open("ab").close()  # its error has a reason, sqlite's has none
            self._database = sqlite3.connect(path, timeout=1, isolation_level=None)
            tables = {name for (name,) in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables - {"replies"}:
                raise UserError(f"{path}: holds {min(tables)}, it is no cache of replies; choose another --out")
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS replies (request BLOB PRIMARY KEY, text TEXT NOT NULL, model TEXT NOT NULL,"
                " prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, checksum BLOB) WITHOUT ROWID"
            )
            columns = [column for _, column, *_ in self._database.execute("PRAGMA table_info(replies)")]
            if "checksum" not in columns:  # a file of an earlier version, whose replies are taken as they are
                self._database.execute("ALTER TABLE replies ADD COLUMN checksum BLOB")
        except OSError as error:
            raise UserError(f"{path}: cannot be used as a cache of replies: {error.strerror}") from None
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise UserError(f"{path}: is in use by another run; wait for it or choose another --out") from None
            raise UserError(f"{path}: cannot be used as a cache of replies: {error}") from None

    def get(self, request: Request) -> Reply | None:
        """The cached reply to exactly this request, or None. Raises UserError for a damaged file."""
        query = "SELECT text, model, prompt_tokens, completion_tokens, checksum FROM replies WHERE request = ?"
        remedy = "delete it, and all is asked again"
        try:
            row = self._database.execute(query, (_digest(request),)).fetchone()
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be used as a cache of replies: {error}; {remedy}") from None
        if row is None:
            return None
        *values, checksum = row
        if [type(value) for value in values] != [str, str, int, int] or checksum not in (None, _digest(values)):
            raise UserError(f"{self.path}: holds {str(values)[:80]} where a reply is expected; {remedy}")
        return Reply(*values)

    def put(self, request: Request, reply: Reply) -> None:
        """Keeps a reply."""
        said = dataclasses.astuple(reply)
        values = (_digest(request), *said, _digest(said))  # sqlite itself does not notice changed bytes
        try:
            self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?)", values)
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be written: {error}") from None

    def __enter__(self) -> "ReplyCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()


def ask_all(
    keys: Sequence[Key],
    request: Callable[[Key], Request],
    cache: ReplyCache,
    *,
    base_url: str | None = None,
    concurrency: int = 16,
    timeout: float = 120,
    max_retries: int = 5,
    stop: Callable[[Statistics], str | None] = lambda statistics: None,
    unit: str = "request",
) -> tuple[dict[Key, Reply | Failure], Statistics]:
    """Asks `request(key)` for every key that the cache has no reply to.

    base_url: of the endpoint; None means OPENAI_BASE_URL or OpenAI. The API key comes from OPENAI_API_KEY. timeout:
    seconds until the last byte of an answer. max_retries: of the openai client, with back-off, after 408, 409, 429 (it
    waits as Retry-After says), 5xx, a timeout or a lost connection. stop: gets the statistics before each request, and
    returns a reason to stop asking, or None. A refused key, an unknown model, and GIVE_UP_AFTER failures of the
    endpoint in succession stop as well. Returns replies and failures by key, without the keys that were not asked.
    Failures are never cached. Raises UserError for a key or address that cannot work.
    """
    results: dict[Key, Reply | Failure] = {}
    statistics = Statistics()
    missing = []
    for key in keys:
        if (reply := cache.get(request(key))) is None:
            missing.append(key)
        else:
            results[key] = reply
            statistics.cached += 1
            statistics.models[reply.model] = statistics.models.get(reply.model, 0) + 1
    if not missing:
        return results, statistics
    api_key = _api_key(base_url)
    queue = iter(missing)
    in_a_row = 0
    broken = None  # the reason to stop asking

    async def work(client: openai.AsyncOpenAI, progress: tqdm) -> None:
        nonlocal in_a_row, broken
        for key in queue:
            statistics.stopped = statistics.stopped or broken or stop(statistics)
            if statistics.stopped:
                return
            try:
                reply = await _ask(client, request(key), statistics)
                cache.put(request(key), reply)
                results[key] = reply
                in_a_row = 0
                statistics.answered += 1
                statistics.models[reply.model] = statistics.models.get(reply.model, 0) + 1
            except (openai.OpenAIError, _NoReply, UnicodeEncodeError) as error:  # the last: half a surrogate pair
                reason = _reason(error, timeout, api_key)
                results[key] = Failure(reason)
                statistics.failed += 1
                in_a_row += _is_endpoints(error)
                if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError):
                    broken = reason
                elif in_a_row >= GIVE_UP_AFTER:
                    broken = f"{in_a_row} failures in a row, the last: {reason}"
                progress.set_postfix(failed=statistics.failed)
            progress.update()

    async def run() -> None:
        options = {"api_key": api_key, "base_url": base_url, "timeout": timeout, "max_retries": max_retries}
        async with openai.AsyncOpenAI(http_client=_Deadline(timeout=timeout), **options) as client:
            with tqdm(total=len(keys), initial=statistics.cached, unit=unit) as progress:
                await asyncio.gather(*(work(client, progress) for _ in range(min(concurrency, len(missing)))))

    asyncio.run(run())
    return results, statistics


def is_dated(model: str) -> bool:
    """Whether a model's name has a date: gpt-4o-2024-08-06, gpt-4-0613, mistral-large-2411, …20250219."""
    for digits in re.findall(r"(?<!\d)(?:20\d\d-\d\d(?:-\d\d)?|20\d{6}|\d{6}|\d{4})(?!\d)", model):
        digits = digits.replace("-", "").removeprefix("20") if len(digits) > 6 else digits
        first, second = int(digits[:2]), int(digits[2:4])
        if (first <= 12 and 1 <= second <= 31 and first) or (20 <= first <= 39 and 1 <= second <= 12):
            return True
    return False


def check_address(base_url: str | None) -> str | None:
    """Returns the endpoint's address, by default OPENAI_BASE_URL. Raises UserError for an impossible address."""
    url = base_url or os.environ.get("OPENAI_BASE_URL")
    if not url:
        return None
    try:
        parts = urlsplit(url)
        secret = parts.username or parts.password or parts.query
        fits = parts.scheme in ("http", "https") and parts.hostname.encode("idna") and parts.port != 0
    except (ValueError, AttributeError):  # a port or a host that is none, half of an IPv6 address
        secret, fits = "@" in url, False
    if secret:
        raise UserError("--base_url: holds a user, a password or a query; the key belongs into OPENAI_API_KEY")
    if not fits or not url.isprintable() or " " in url:
        raise UserError(f"--base_url={' '.join(url.split())}: expected an address such as http://127.0.0.1:8000/v1")
    return url


class _Deadline(openai.DefaultAsyncHttpxClient):
    """Ends a request whose whole answer does not come in time; the client's own timeout restarts with each byte."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            async with asyncio.timeout(self.timeout.read):
                return await super().send(request, **options)
        except TimeoutError:
            raise httpx2.ReadTimeout("no whole answer in time", request=request) from None


class _NoReply(Exception):
    """The endpoint answered, but not with a text."""


async def _ask(client: openai.AsyncOpenAI, request: Request, statistics: Statistics) -> Reply:
    """Returns the reply. Counts retries and tokens, also of an unusable answer."""
    response = await client.chat.completions.with_raw_response.create(**request)
    statistics.retries += response.retries_taken
    try:
        body = json.loads(response.text)
        choice = body["choices"][0]
        text, end = choice["message"].get("content"), choice.get("finish_reason")
        refusal = choice["message"].get("refusal")
        usage = body.get("usage") or {}
        tokens = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
        model = body.get("model") or request["model"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _NoReply(f"the endpoint answered with something else than a chat completion: {response.text}") from None
    if not all(type(count) is int and 0 <= count <= MOST_TOKENS for count in tokens) or not isinstance(model, str):
        raise _NoReply(f"the endpoint's token counts or model name are none: {str([*tokens, model])[:120]}")
    statistics.prompt_tokens += tokens[0]
    statistics.completion_tokens += tokens[1]
    if refusal or end == "content_filter":
        raise _NoReply(f"refused: {refusal or 'by a content filter'}")
    if end == "length":
        raise _NoReply(f"the reply was cut off at the endpoint's limit of tokens ({tokens[1]})")
    if not isinstance(text, str) or not text.strip():
        raise _NoReply("the reply is empty")
    return Reply(text.strip(), model, *tokens)


def _is_endpoints(error: Exception) -> bool:
    """Whether a failure is the endpoint's and not the request's."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)


def _reason(error: Exception, timeout: float, api_key: str) -> str:
    """The error on one line, without the API key, which an endpoint may repeat in its message."""
    if isinstance(error, openai.APITimeoutError):
        text = f"no answer within {timeout:g} s"
    elif isinstance(error, openai.APIConnectionError):
        text = f"the connection failed: {error.__cause__ or error}"
    elif isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        text = f"HTTP {error.status_code}: {body.get('message') or error.response.text or error.response.reason_phrase}"
    else:
        text = str(error)
    return " ".join(text.replace(api_key, "[API key]").split())[:200]


def _api_key(base_url: str | None) -> str:
    """OPENAI_API_KEY, or a placeholder for servers without keys."""
    url = check_address(base_url)
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and not url:
        raise UserError("OPENAI_API_KEY is not set; for a server that needs no key give its --base_url")
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY: holds characters that no key has")
    return key or "no-key-needed"


def _digest(value: Any) -> bytes:
    """The SHA-256 of a request or of a reply's fields."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
