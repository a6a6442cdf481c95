"""Who asks, and how much each may: callers are told apart by their bearer tokens.

A file of named tokens is TOML:

    handle_secret = "..."            # optional: keeps image handles valid when tokens change

    [alice]
    token = ["...", "..."]           # one or several, for rotation; or token_sha256, in hex
    rate = 5                         # requests a second
    burst = 20                       # of them at once
    concurrency = 2                  # requests at the model server at once
    new_words_per_minute = 600       # class names that she has not sent before
    metrics = true                   # may read /metrics
    vocabularies = true              # may put and delete vocabularies

Rates are those of one gateway: with N replicas, callers may get N times as much.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
import tomllib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

from regionspot.errors import InputError
from regionspot.serving.contract import RequestError
from regionspot.serving.gateway.errors import HttpError
from regionspot.serving.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

ANONYMOUS, ONLY_TOKEN, METRICS_TOKEN = "anonymous", "token", "metrics-token"
MIN_TOKEN_LENGTH = 16
POLL_S = 1.0
"""How often a file is looked at."""

MAX_REMEMBERED_WORDS = 10_000
"""Of each caller."""

KEYS = (
    *("token", "token_sha256", "rate", "burst", "concurrency", "new_words_per_minute"),
    *("metrics", "vocabularies"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_TOKEN = re.compile(rf"[\x21-\x7e]{{{MIN_TOKEN_LENGTH},}}")
_ValueT = TypeVar("_ValueT")


@dataclass(frozen=True)
class Quota:
    """What a caller may do; None is without a limit.

    Args:
        rate: requests a second, on average.
        burst: requests at once that `rate` allows.
        concurrency: requests at the model server at once.
        new_words_per_minute: class names that the caller has not sent before.
    """

    rate: float | None = None
    burst: int = 1
    concurrency: int | None = None
    new_words_per_minute: int | None = None


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Args:
        name: of the token; for logs and metrics.
        quota: its limits.
        named: whether it is one of several callers, who must not hinder or watch each other.
        may_read_metrics: whether /metrics is open to it.
        may_ask: whether /v1 is.
        may_edit_vocabularies: whether it may put and delete vocabularies.
        handle_key: a secret of this caller that it does not know itself, for its image handles.
    """

    name: str
    quota: Quota = Quota()
    named: bool = False
    may_read_metrics: bool = True
    may_ask: bool = True
    may_edit_vocabularies: bool = True
    handle_key: bytes | None = None


class Watched(Generic[_ValueT]):
    """What a file says; read again when it changes. A file that is damaged later leaves what it
    said before.
    """

    def __init__(self, path: Path, read: Callable[[Path], _ValueT]) -> None:
        self._path, self._read = path, read
        self._stamp = self._look()
        self._value = read(path)
        self._looked_at = time.monotonic()

    def value(self) -> _ValueT:
        now = time.monotonic()
        if now - self._looked_at >= POLL_S:
            self._looked_at = now
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                self._read_again()
        return self._value

    def _read_again(self) -> None:
        try:
            self._value = self._read(self._path)
        except InputError as error:
            logger.warning(f"what {self._path} said before is kept: {error}")
        else:
            logger.info(f"{self._path} was read again")

    def _look(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino


class Callers:
    """Those who may ask a gateway.

    Raises:
        InputError: a file of tokens that cannot be used.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._anonymous = settings.anonymous
        self._known = _known(settings)
        self._metrics: Watched[Mapping[bytes, Caller]] | None = None
        if settings.metrics_token_file is not None:
            self._metrics = Watched(settings.metrics_token_file, _metrics_token)
        self._meters: dict[str, Meter] = {}

    @property
    def are_several(self) -> bool:
        """Whether there is more than one name."""
        return len({caller.name for caller in self._known().values()}) > 1

    def identify(self, authorization: str) -> Caller:
        """The caller who shows an Authorization header, "" for none.

        Raises:
            HttpError: UNAUTHORIZED.
        """
        scheme, _, shown = authorization.partition(" ")
        if scheme.lower() == "bearer":
            digest = sha256(shown.strip().encode()).digest()
            for known in (self._known, None if self._metrics is None else self._metrics.value):
                found = None if known is None else known().get(digest)
                if found is not None:
                    return found
        if self._anonymous:
            return Caller(ANONYMOUS)
        raise unauthorized()

    def may_read_metrics(self, caller: Caller) -> bool:
        """Whether /metrics is open to a caller. Where it has a token of its own, only named tokens
        open it, too.
        """
        if caller.name in (ANONYMOUS, ONLY_TOKEN):
            return self._metrics is None
        return caller.may_read_metrics

    def meter(self, caller: Caller) -> Meter:
        """What a caller has used up. A new quota begins where the old one was."""
        meter = self._meters.setdefault(caller.name, Meter())
        meter.quota = caller.quota
        return meter


class Meter:
    """How much of its quota a caller has used."""

    def __init__(self) -> None:
        self.quota = Quota()
        self._requests, self._words = _Bucket(), _Bucket()
        self._known: OrderedDict[str, None] = OrderedDict()

    def take_request(self) -> None:
        """Raises HttpError QUOTA_EXCEEDED, with when to come back."""
        if self.quota.rate is not None:
            wait_s = self._requests.take(1, self.quota.rate, self.quota.burst)
            if wait_s > 0:
                raise _exceeded(f"more than {self.quota.rate:g} requests a second", wait_s)

    def take_words(self, words: Sequence[str]) -> None:
        """Raises HttpError QUOTA_EXCEEDED; RequestError TOO_MANY_WORDS, more than a minute's
        worth.
        """
        most = self.quota.new_words_per_minute
        if most is None:
            return
        count = sum(word not in self._known for word in words)
        if count > most:
            raise RequestError(
                "TOO_MANY_WORDS",
                f"{count} of the class names are new, and this token may send {most} new ones a "
                "minute: send them in several requests",
            )
        wait_s = self._words.take(count, most / 60, most)
        if wait_s > 0:
            raise _exceeded(f"more than {most} new class names a minute", wait_s)

    def remember(self, words: Sequence[str]) -> None:
        """Takes down words that the server has answered with, which are not new any more."""
        if self.quota.new_words_per_minute is None:
            return
        for word in words:
            self._known[word] = None
            self._known.move_to_end(word)
        while len(self._known) > MAX_REMEMBERED_WORDS:
            self._known.popitem(last=False)


class _Bucket:
    """A token bucket: it fills with `rate` a second, up to `capacity`."""

    def __init__(self) -> None:
        self._used = 0.0
        self._at = time.monotonic()

    def take(self, amount: int, rate: float, capacity: float) -> float:
        """0, or the seconds until there is enough."""
        now = time.monotonic()
        self._used = max(self._used - (now - self._at) * rate, 0.0)
        self._at = now
        lacking = self._used + amount - capacity
        if lacking > 0:
            return lacking / rate
        self._used += amount
        return 0.0


def unauthorized() -> HttpError:
    return HttpError(
        "UNAUTHORIZED",
        "this gateway wants its token: send the header Authorization: Bearer TOKEN",
        headers={"WWW-Authenticate": 'Bearer realm="regionspot"'},
    )


def _exceeded(what: str, wait_s: float) -> HttpError:
    seconds = int(wait_s) + 1
    return HttpError(
        "QUOTA_EXCEEDED",
        f"this token was used for {what}: come back in {seconds} s",
        headers={"Retry-After": str(seconds)},
    )


def _known(settings: GatewaySettings) -> Callable[[], Mapping[bytes, Caller]]:
    if settings.tokens_file is not None:
        return Watched(settings.tokens_file, read_tokens).value
    if settings.token_file is not None:
        return Watched(settings.token_file, _only_token).value
    only = {} if settings.token is None else {_digest(settings.token): Caller(ONLY_TOKEN)}
    return lambda: only


def _only_token(path: Path) -> Mapping[bytes, Caller]:
    return {_digest(first_line(path)): Caller(ONLY_TOKEN)}


def _metrics_token(path: Path) -> Mapping[bytes, Caller]:
    return {_digest(first_line(path)): Caller(METRICS_TOKEN, may_ask=False)}


def first_line(path: Path) -> str:
    """The token in a file.

    Raises:
        InputError: there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file of a token {path} cannot be read: {error}") from error
    if not lines or not _TOKEN.fullmatch(lines[0].strip()):
        raise InputError(
            f"{path}: its first line must be a token of at least {MIN_TOKEN_LENGTH} characters, "
            "printable ASCII without spaces"
        )
    return lines[0].strip()


def read_tokens(path: Path) -> dict[bytes, Caller]:
    """SHA-256 of each token of a TOML file -> its caller.

    Raises:
        InputError: a file that is damaged, or says what cannot be.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the file of tokens {path} cannot be read: {error}") from error
    secret = content.pop("handle_secret", None)
    if secret is not None and not (isinstance(secret, str) and len(secret) >= MIN_TOKEN_LENGTH):
        raise InputError(
            f"{path}: handle_secret must be a text of at least {MIN_TOKEN_LENGTH} characters"
        )
    digests = {name: _digests(table, f"{path}: {name}") for name, table in content.items()}
    everybody = sorted(digest for found in digests.values() for digest in found)
    if not everybody:
        raise InputError(f"{path} has no token: write a table such as [alice] with a key token")
    if len(set(everybody)) < len(everybody):
        raise InputError(f"{path}: a token stands there twice: each opens for one name")
    # nobody knows the tokens of all, and gateways with the same file agree
    master = b"".join(everybody) if secret is None else secret.encode()
    found: dict[bytes, Caller] = {}
    for name, table in content.items():
        caller = _caller(name, table, f"{path}: {name}", master)
        found |= dict.fromkeys(digests[name], caller)
    return found


def _caller(name: str, table: Mapping[str, Any], where: str, master: bytes) -> Caller:
    if not _NAME.fullmatch(name) or name in (ANONYMOUS, ONLY_TOKEN, METRICS_TOKEN):
        raise InputError(f"{where}: take another name, of letters, digits, '.', '_' and '-'")
    rate = _number(table, "rate", where, float)
    quota = Quota(
        rate=rate,
        burst=_number(table, "burst", where, int) or max(int(rate or 1), 1),
        concurrency=_number(table, "concurrency", where, int),
        new_words_per_minute=_number(table, "new_words_per_minute", where, int),
    )
    handle_key = hmac.digest(sha256(master).digest(), name.encode(), "sha256")
    return Caller(
        name,
        quota,
        named=True,
        may_read_metrics=_flag(table, "metrics", where),
        may_edit_vocabularies=_flag(table, "vocabularies", where),
        handle_key=handle_key,
    )


def _flag(table: Mapping[str, Any], key: str, where: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"{where}: {key} must be true or false")
    return value


def _digests(table: Any, where: str) -> list[bytes]:
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table: [NAME], and keys of it below")
    if unknown := sorted(set(table) - set(KEYS)):
        raise InputError(f"{where}: there is no key {unknown[0]!r}: known are {', '.join(KEYS)}")
    tokens = _texts(table, "token", where)
    if not all(_TOKEN.fullmatch(token) for token in tokens):
        raise InputError(
            f"{where}: a token must have at least {MIN_TOKEN_LENGTH} printable ASCII characters"
        )
    hashes = _texts(table, "token_sha256", where)
    if not all(_SHA256.fullmatch(text) for text in hashes):
        raise InputError(f"{where}: token_sha256 must be 64 hexadecimal digits")
    return [_digest(token) for token in tokens] + [bytes.fromhex(text) for text in hashes]


def _texts(table: Mapping[str, Any], key: str, where: str) -> list[str]:
    given = table.get(key, [])
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: {key} must be a text, or a list of them")
    return texts


def _number(table: Mapping[str, Any], key: str, where: str, kind: type) -> Any:
    value = table.get(key)
    if value is None:
        return None
    is_number = type(value) in (int, kind)
    if not is_number or not 0 < value < float("inf"):
        raise InputError(f"{where}: {key} must be a number above 0")
    return value


def _digest(token: str) -> bytes:
    return sha256(token.encode()).digest()
