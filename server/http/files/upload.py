"""Reads the body of a request in the form multipart/form-data that uploads a file. The content goes to the disk as it
arrives, so that it is never in memory as a whole."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

import anyio.to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.files.store import Arriving

FILE = "file"
MAX_FIELD_BYTES = 256  # longest value of a field that is no file
MAX_NAME_BYTES = 255  # longest name of a file
MAX_PARTS = 16
MAX_HEADER_BYTES = 2048  # longest header of a part, its name and its value together
LEAST_RATE = 16 * 1024  # bytes of a file that must arrive in each second, after the first seconds
IDLE_SECONDS = 30.0  # time after which an upload is refused if nothing of it arrives
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass
class Form:
    """What an upload has sent: the text of each field that is no file, and the name of the file, or None."""

    fields: dict[str, str] = field(default_factory=dict[str, str])
    filename: str | None = None


async def read_upload(request: Request, arriving: Arriving, known: frozenset[str], *, patience: float) -> Form:
    """Reads a form with one file and with fields of the names `known`. Writes the file into `arriving`.

    Raises RequestRejected for a form that is malformed or has other fields, and HTTPException for a body of another
    media type, and for an upload that stops or is very slow after the first `patience` seconds. Raises what
    `arriving.write` raises. Raises ClientDisconnect if the connection breaks.
    """
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type != b"multipart/form-data":
        shown = media_type.decode(errors="replace")[:64]
        raise HTTPException(415, f"Content-Type is {shown!r}; it must be multipart/form-data.")
    if not options.get(b"boundary"):
        raise RequestRejected(
            "Content-Type has no boundary. HTTP clients add one themselves if they are not told a Content-Type.",
            code="invalid_form",
        )
    reader = _Reader(arriving, known)
    try:
        parser = MultipartParser(options[b"boundary"], reader.callbacks())  # pyright: ignore[reportArgumentType]
        chunks, start = aiter(request.stream()), asyncio.get_running_loop().time()
        while True:
            if asyncio.get_running_loop().time() - start > patience + arriving.size / LEAST_RATE:
                raise HTTPException(408, f"The body arrives with less than {LEAST_RATE} bytes per second.")
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    chunk = await anext(chunks, b"")
            except TimeoutError:
                raise HTTPException(
                    408, f"No more of the body arrived for {IDLE_SECONDS:g} s, and it is not complete."
                ) from None
            if not chunk:
                break
            await anyio.to_thread.run_sync(parser.write, chunk)
        parser.finalize()
    except FormParserError as error:
        raise RequestRejected(f"The body is not valid multipart/form-data: {error}.", code="invalid_form") from None
    if not reader.ended:
        raise RequestRejected("The body ends before the form does.", code="invalid_form")
    return reader.form


class _Reader:
    """Takes the events of the parser. A part is a field or the file."""

    def __init__(self, arriving: Arriving, known: frozenset[str]) -> None:
        self.form, self.ended = Form(), False
        self._arriving, self._known = arriving, known
        self._num_parts = 0
        self._header, self._value = b"", b""
        self._disposition: dict[bytes, bytes] = {}
        self._name = ""
        self._text = bytearray()

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin_part,
            "on_header_begin": self._begin_header,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise RequestRejected(f"The form has more than {MAX_PARTS} parts.", code="invalid_form")
        self._disposition = {}
        self._text.clear()

    def _begin_header(self) -> None:
        self._header, self._value = b"", b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        # Older versions of the parser accept headers of any length.
        if len(self._header) + len(self._value) > MAX_HEADER_BYTES:
            raise RequestRejected(
                f"A part of the form has a header with more than {MAX_HEADER_BYTES} bytes.", code="invalid_form"
            )

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = dict(parse_options_header(self._value)[1])

    def _end_headers(self) -> None:
        self._name = self._disposition.get(b"name", b"").decode(errors="replace")
        filename = self._disposition.get(b"filename")
        if self._name == FILE:
            if filename is None:
                raise RequestRejected("file is a text; it must be a file with a name.", param=FILE)
            if self.form.filename is not None:
                raise RequestRejected("The form has more than one file.", param=FILE)
            self.form.filename = clean_name(filename)
        elif self._name not in self._known:
            raise RequestRejected(
                f"{_shown(self._name)} is not a field of this API.", param=_shown(self._name), code="unknown_parameter"
            )
        elif self._name in self.form.fields:
            raise RequestRejected(f"{self._name} is there twice.", param=self._name)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE:
            self._arriving.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            raise RequestRejected(f"{self._name} has more than {MAX_FIELD_BYTES} bytes.", param=self._name)

    def _end_part(self) -> None:
        if self._name != FILE:
            self.form.fields[self._name] = self._text.decode(errors="replace")

    def _end(self) -> None:
        self.ended = True


def clean_name(name: bytes) -> str:
    """Returns the name of a file without folders and control characters. It is shown to clients and never used as a
    name in the file system."""
    text = _CONTROL.sub("", name[-4 * MAX_NAME_BYTES :].decode(errors="replace"))
    return re.split(r"[/\\]", text)[-1][-MAX_NAME_BYTES:] or "file"


def _shown(name: str) -> str:
    return _CONTROL.sub("?", name[:64]) or "a part without a name"
