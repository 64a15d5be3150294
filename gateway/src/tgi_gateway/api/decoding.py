"""Request bodies read under a size limit, decoded into what a route takes, and rejected in TGI's words."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeVar, get_args, get_origin

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.types import Receive

from tgi_gateway.api.errors import ClientGone, Rejection, UnknownParameter

Body = TypeVar("Body", bound=Struct)

_JSON_SUFFIX = "+json"
READ_TIMEOUT_S = 60.0
"""Whoever sends more slowly holds a connection for nothing."""


def check_content_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith(_JSON_SUFFIX)):
        raise Rejection(415, "Expected request with `Content-Type: application/json`")


async def read(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is longer than `limit` bytes. Raises `Rejection`, or `ClientGone`."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise _too_long(limit)
    patience = asyncio.timeout(READ_TIMEOUT_S)
    try:
        async with patience:
            return await _read(request.receive, limit)
    except TimeoutError:
        if not patience.expired():
            raise
        raise Rejection(408, f"The request body did not come within {READ_TIMEOUT_S:g} seconds") from None


async def _read(receive: Receive, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_long(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_long(limit: int) -> Rejection:
    return Rejection(413, f"Failed to buffer the request body: length limit exceeded ({limit} bytes)")


@cache
def _decoder(kind: type[Body]) -> msgspec.json.Decoder[Body]:
    return msgspec.json.Decoder(kind)


def decode(raw: bytes, kind: type[Body], *, strict: bool = False) -> Body:
    """The body as a `kind`. Raises `Rejection`: 400 for what is no JSON, 422 for what has the wrong shape."""
    try:
        body: Body = _decoder(kind).decode(raw)
    except msgspec.ValidationError as error:
        _plain(raw)  # found at the first wrong value: what comes after it may be no JSON at all
        raise Rejection(422, f"Failed to deserialize the JSON body into the target type: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_json(error) from None
    if strict:
        for where, name, _ in _unknown(_plain(raw), _Inside((kind,)), "$"):
            raise Rejection(
                422, f"Failed to deserialize the JSON body into the target type: unknown field `{name}` at `{where}`"
            )
    return body


def decode_known(raw: bytes, kind: type[Body]) -> Body:
    """As `decode`, for APIs that refuse what they do not define. Raises `UnknownParameter` as well."""
    body = decode(raw, kind)
    for where, name, known in _unknown(_plain(raw), _Inside((kind,)), "$"):
        near = difflib.get_close_matches(name, known, n=1)
        raise UnknownParameter(f"{where}.{name}".removeprefix("$."), f"; did you mean `{near[0]}`?" if near else "")
    return body


def _plain(raw: bytes) -> object:
    try:
        return msgspec.json.decode(raw)
    except msgspec.ValidationError:
        return None  # a number out of range is still JSON
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_json(error) from None


def _no_json(error: Exception) -> Rejection:
    text = str(error)
    if isinstance(error, UnicodeDecodeError):
        text = f"invalid UTF-8 ({error.reason})"
    elif isinstance(error, RecursionError):
        text = "recursion limit exceeded"
    return Rejection(400, f"Failed to parse the request body as JSON: {text}")


@dataclass(frozen=True, slots=True)
class _Inside:
    """The structs that a value of some type may be, and what the items of a list may be."""

    structs: tuple[type[Struct], ...] = ()
    items: _Inside | None = None

    @staticmethod
    def of(kind: object) -> _Inside | None:
        """Follows unions and lists; None: no struct anywhere."""
        if isinstance(kind, type) and issubclass(kind, Struct):
            return _Inside((kind,))
        parts = [part for inner in get_args(kind) if (part := _Inside.of(inner)) is not None]
        if not parts:
            return None
        items = next((part.items for part in parts if part.items is not None), None)
        found = _Inside(tuple(struct for part in parts for struct in part.structs), items)
        return _Inside(items=found) if get_origin(kind) is list else found


def _unknown(value: object, inside: _Inside, where: str) -> Iterator[tuple[str, str, list[str]]]:
    """Each key that no struct knows which `value` may be: where it is, its name, and the names that are known there."""
    if isinstance(value, list):
        if inside.items is not None:
            for place, item in enumerate(value):
                yield from _unknown(item, inside.items, f"{where}[{place}]")
    elif isinstance(value, dict):
        structs = [struct for struct in inside.structs if _may_be(struct, value)]
        if not structs:
            return
        known = _fields(structs[0])
        for struct in structs[1:]:
            known = known | _fields(struct)
        for key, inner in value.items():
            if key not in known:
                yield where, key, list(known)
            elif (deeper := known[key]) is not None:
                yield from _unknown(inner, deeper, f"{where}.{key}")


def _may_be(struct: type[Struct], value: dict[str, object]) -> bool:
    config = struct.__struct_config__
    return config.tag is None or value.get(str(config.tag_field)) == config.tag


@cache
def _fields(struct: type[Struct]) -> dict[str, _Inside | None]:
    fields = {field.encode_name: _Inside.of(field.type) for field in msgspec.structs.fields(struct)}
    config = struct.__struct_config__
    if config.tag_field is not None:
        fields[config.tag_field] = None
    return fields
