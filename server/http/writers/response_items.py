"""The output items of a response of /v1/responses while the model is still writing them. Each class turns the parts of
one item into the events of a stream.

The order of the events is OpenAI's: the item is added, then its content, then come the pieces of its text, and at the
end the text, the content and the item are done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jamba_server.server.http.schemas.responses.items import encode_reasoning, new_id
from jamba_server.server.http.schemas.responses.reply import (
    ItemStatus,
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    TokenLogprob,
)
from jamba_server.server.http.schemas.responses.tools import FunctionName


class Event(NamedTuple):
    """An event of a stream: its type and its other fields. The sequence number is added later."""

    type: str
    fields: dict[str, Any]


class GrowingItem(ABC):
    """An output item that the model is still writing. `index` is the number of the item in the response's output."""

    def __init__(self, prefix: str, index: int) -> None:
        self.id, self.index = new_id(prefix), index
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @abstractmethod
    def item(self, status: ItemStatus) -> OutputItem:
        """Returns the item with the text that it has now."""

    @abstractmethod
    def begin(self) -> Iterator[Event]:
        """Returns the events that come before the first piece of text."""

    @abstractmethod
    def end(self, status: ItemStatus) -> Iterator[Event]:
        """Returns the events that come after the last piece of text."""

    def _added(self, item: OutputItem) -> Event:
        return Event("response.output_item.added", {"output_index": self.index, "item": item})

    def _done(self, status: ItemStatus) -> Event:
        return Event("response.output_item.done", {"output_index": self.index, "item": self.item(status)})

    def _event(self, kind: str, **fields: Any) -> Event:
        return Event(f"response.{kind}", {"item_id": self.id, "output_index": self.index, **fields})


class GrowingMessage(GrowingItem):
    """The output item with the ordinary text of a reply."""

    def __init__(self, index: int) -> None:
        super().__init__("msg", index)
        self._logprobs: list[TokenLogprob] = []

    def item(self, status: ItemStatus) -> OutputMessage:
        return OutputMessage(id=self.id, status=status, content=[self._part()])

    def begin(self) -> Iterator[Event]:
        yield self._added(OutputMessage(id=self.id, status="in_progress", content=[]))
        yield self._event("content_part.added", content_index=0, part=OutputText(text=""))

    def push(self, text: str, logprobs: Iterable[TokenLogprob]) -> Iterator[Event]:
        new = list(logprobs)
        self._pieces.append(text)
        self._logprobs += new
        yield self._event("output_text.delta", content_index=0, delta=text, logprobs=new)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        yield self._event("output_text.done", content_index=0, text=self.text, logprobs=self._logprobs)
        yield self._event("content_part.done", content_index=0, part=self._part())
        yield self._done(status)

    def _part(self) -> OutputText:
        return OutputText(text=self.text, logprobs=tuple(self._logprobs))


class GrowingReasoning(GrowingItem):
    """The output item with the model's reasoning. If `encoded` is true, the finished item also has the reasoning in the
    field `encrypted_content`."""

    def __init__(self, index: int, *, encoded: bool) -> None:
        super().__init__("rs", index)
        self._encoded = encoded

    def item(self, status: ItemStatus) -> OutputReasoning:
        return OutputReasoning(
            id=self.id,
            status=status,
            content=[ReasoningText(text=self.text)],
            encrypted_content=encode_reasoning(self.text) if self._encoded else None,
        )

    def begin(self) -> Iterator[Event]:
        yield self._added(OutputReasoning(id=self.id, status="in_progress", content=[]))
        yield self._event("content_part.added", content_index=0, part=ReasoningText(text=""))

    def push(self, text: str) -> Iterator[Event]:
        self._pieces.append(text)
        yield self._event("reasoning_text.delta", content_index=0, delta=text)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        yield self._event("reasoning_text.done", content_index=0, text=self.text)
        yield self._event("content_part.done", content_index=0, part=ReasoningText(text=self.text))
        yield self._done(status)


class GrowingCall(GrowingItem):
    """The output item with a call of a function. `number` is the number of the call among the calls of the reply."""

    def __init__(self, index: int, *, number: int, call_id: str, name: FunctionName) -> None:
        super().__init__("fc", index)
        self.number = number
        self._call_id, self._name = call_id, name

    def item(self, status: ItemStatus) -> OutputFunctionCall:
        return OutputFunctionCall(
            id=self.id,
            call_id=self._call_id,
            namespace=self._name.namespace,
            name=self._name.name,
            arguments=self.text,
            status=status,
        )

    def begin(self) -> Iterator[Event]:
        yield self._added(self.item("in_progress"))

    def push(self, arguments: str) -> Iterator[Event]:
        if arguments:
            self._pieces.append(arguments)
            yield self._event("function_call_arguments.delta", delta=arguments)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        yield self._event("function_call_arguments.done", name=self._name.name, arguments=self.text)
        yield self._done(status)
