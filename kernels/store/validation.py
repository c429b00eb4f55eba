"""Reading records that anybody may have written: what is wrong is named and counted, and never raised."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Protocol, cast

from attnrewrite.kernels.store.key import VERSION, Device, Key, Pairs, pairs
from attnrewrite.kernels.store.record import LARGEST, STATUSES, Record, Status, Timing


class Refusal(StrEnum):
    """Why a record is left aside."""

    LARGE = "larger than a record can be"
    TRUNCATED = "truncated, or no JSON"
    TAMPERED = "its content is not what its name says"
    VERSION = "of another version"
    FORM = "not of a record's form"
    PLACE = "under another key's name"
    SIGNATURE = "without the right signature"
    SPACE = "its winner is outside the space of configurations"


class Space(Protocol):
    """The configurations that a kernel declares."""

    def valid(self, config: Mapping[str, Any]) -> bool:
        """Whether the kernel can be run like this."""


def fits(config: Pairs, space: Space) -> bool:
    """Whether a configuration that anybody may have written is one of ``space``."""
    try:
        return space.valid(dict(config))
    except (KeyError, TypeError, ValueError, OverflowError):  # a field is missing, or of another type
        return False


def read(data: bytes, path: str | None = None, secret: bytes = b"") -> Record | Refusal:
    """Return the record in a file's content, or why it is refused.

    path: the record's name, where it has one; both the content and the key must be what it says.
    secret: where there is one, only records with its signature are accepted.
    """
    if len(data) > LARGEST:
        return Refusal.LARGE
    try:
        plain = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return Refusal.TRUNCATED
    if path is not None and not path.endswith(f"/{hashlib.sha256(data).hexdigest()}.json"):
        return Refusal.TAMPERED
    if not isinstance(plain, dict) or plain.get("version") != VERSION:
        return Refusal.VERSION if isinstance(plain, dict) and "version" in plain else Refusal.FORM
    try:
        record = _record(plain)
        if record.data != data:  # another spelling, fields that a record does not have
            return Refusal.FORM
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return Refusal.FORM
    if path is not None and path != record.path:
        return Refusal.PLACE
    if secret and not record.is_signed(secret):
        return Refusal.SIGNATURE
    return record


def _no_number(name: str) -> None:
    raise ValueError(name)


def _record(plain: dict[str, Any]) -> Record:
    timings = tuple(_timing(each) for each in plain["timings"])
    winner = _pairs(plain["winner"])
    if not any(timing.config == winner and timing.status == "ok" for timing in timings):
        raise ValueError("the winner was not timed")
    return Record(
        key_of(plain["key"]),
        timings,
        winner,
        noise=_number(plain["noise"]),
        revision=_count(plain["revision"]),
        time=_count(plain["time"]),
        origin=_pairs(plain["origin"]),
        signature=_text(plain.get("signature", "")),
    )


def key_of(plain: dict[str, Any]) -> Key:
    """Return the key in plain data. Raises ValueError, TypeError, KeyError or AttributeError where it is none."""
    device = plain["device"]
    facts = {name: (_text if name in ("name", "mig") else _count)(device[name]) for name in Device._fields}
    names = {name: _text(plain[name]) for name in ("kernel", "source", "triton", "target")}
    return Key(
        family=_family(plain["family"]),
        **names,
        device=Device(**cast(dict[str, Any], facts)),
        dtypes=tuple(_text(name) for name in plain["dtypes"]),
        dims=_pairs(plain["dims"]),
        flags=_pairs(plain["flags"]),
        bucket=_pairs(plain["bucket"]),
        deterministic=_flag(plain["deterministic"]),
    )


def _timing(plain: dict[str, Any]) -> Timing:
    status = _text(plain["status"])
    if status not in STATUSES:
        raise ValueError(status)
    times = {name: _number(plain[name]) for name in ("median", "p20", "p80") if name in plain}
    if status == "ok" and not times["p20"] <= times["median"] <= times["p80"]:
        raise ValueError("quantiles out of order")
    used = {name: _count(plain[name]) for name in ("registers", "spills", "shared") if name in plain}
    return Timing(
        _pairs(plain["config"]),
        cast(Status, status),
        times.get("median"),
        times.get("p20"),
        times.get("p80"),
        _count(plain["n"]),
        used.get("registers"),
        used.get("spills"),
        used.get("shared"),
    )


def _pairs(plain: dict[str, Any]) -> Pairs:
    return pairs({_text(name): _value(value) for name, value in plain.items()})


def _value(value: Any) -> bool | int | str:
    if isinstance(value, int):
        return value if isinstance(value, bool) else _count(value)
    return _text(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():  # it is shown in terminals
        raise TypeError(value)
    return value


def _family(value: Any) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", _text(value)):  # it is the name of a folder
        raise ValueError(value)
    return _text(value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise TypeError(value)
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise TypeError(value)
    return value
