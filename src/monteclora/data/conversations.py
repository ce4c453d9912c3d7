"""Conversations as they stand in data, in the notations that are in use, to one notation.

A message has ``role`` and ``content``, or ShareGPT's ``from`` and ``value``. What else a chat template can make use of
(tool calls, names, thoughts) is kept in ``extra``, JSON text with

- ``messages``: an object for each message, to be added to it;
- ``unlearned``: the numbers of the assistant's messages that are not to be learned;
- ``tools``: what the model may call.

Plain conversations have no ``extra``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from monteclora.config import brief
from monteclora.errors import DataError

__all__ = ["ROLES", "Conversation", "read_conversation", "with_prompt"]

ROLES = ("system", "user", "assistant", "tool")
_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
}
_FOR_TEMPLATES = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
_READ = frozenset(("role", "content", "from", "value", "weight", *_FOR_TEMPLATES))
_HINT = 'Write messages as [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'


class Conversation:
    """Messages that are read one by one.

    Args:
        place: of the row, for messages.
        roles: names of roles in the data, by which of ours they are.
        tools: what the model may call.
    """

    def __init__(self, place: str, roles: Mapping[str, str] | None = None, tools: Any = None) -> None:
        self.place = place
        self.messages: list[dict[str, str]] = []
        self.ignored: set[str] = set()
        self._roles = {**_NAMES, **(roles or {})}
        self._extras: list[dict[str, Any]] = []
        self._unlearned: list[int] = []
        self._tools = self._parsed(tools)

    def add(self, message: Any, learned: bool = True) -> None:
        """Add a message as it is in the data. Raises DataError where it cannot be one."""
        if not isinstance(message, Mapping):
            raise DataError(f"{self.place}: messages is not a list of objects", _HINT)
        name = message.get("role", message.get("from"))
        role = self._roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise DataError(
                f"{self.place}: the role {brief(name)} is not one of {', '.join(ROLES)}",
                f"{_HINT} Or say in data.roles which of these it is.",
            )
        extra = {key: message[key] for key in _FOR_TEMPLATES if message.get(key)}
        content = message.get("content", message.get("value"))
        if (content is None or content == "") and "tool_calls" in extra:
            content = ""
        if not self._is_learned(message.get("weight"), role) or not learned:
            self._unlearned.append(len(self.messages))
        self.messages.append({"role": role, "content": self._text(content, required="tool_calls" not in extra)})
        self._extras.append(extra)
        self.ignored |= {key for key in message if key not in _READ and message[key] is not None}

    def finish(self, only_last: bool = False, with_answer: bool = True) -> dict[str, Any] | None:
        """The columns of the row; None where an answer is needed and the conversation does not end with one.

        Args:
            only_last: only the last message is learned.
            with_answer: whether an answer is needed.
        """
        if not self.messages:
            raise DataError(f"{self.place}: the conversation has no message", _HINT)
        if self.messages[0]["role"] == "assistant":
            raise DataError(f"{self.place}: the first message is the assistant's, it answers nothing", _HINT)
        last = len(self.messages) - 1
        if with_answer and self.messages[last]["role"] != "assistant":
            return None
        unlearned = set(self._unlearned) | (set(range(last)) if only_last else set())
        unlearned = {n for n in unlearned if self.messages[n]["role"] == "assistant"}
        extra: dict[str, Any] = {}
        if any(self._extras):
            extra["messages"] = self._extras
        if unlearned and with_answer:
            extra["unlearned"] = sorted(unlearned)
        if self._tools:
            extra["tools"] = self._tools
        row: dict[str, Any] = {"messages": self.messages}
        return {**row, "extra": json.dumps(extra, ensure_ascii=False)} if extra else row

    def _is_learned(self, weight: Any, role: str) -> bool:
        if weight is None:
            return True
        if role != "assistant" or weight not in (0, 1):
            raise DataError(
                f"{self.place}: a message of the {role} has the weight {brief(weight)}",
                "Weights are 0 or 1, of the assistant's messages.",
            )
        return bool(weight)

    def _text(self, content: Any, required: bool) -> str:
        if isinstance(content, list):
            content = "".join(map(self._part, content))
        if not isinstance(content, str) or (required and not content.strip()):
            found = "no text" if content is None or content == "" or isinstance(content, str) else brief(content)
            raise DataError(f"{self.place}: a message has {found} where text is expected", _HINT)
        try:
            content.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{self.place}: a message holds half a character (a lone surrogate)", "Correct the text."
            ) from None
        return content

    def _part(self, part: Any) -> str:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise DataError(
                f"{self.place}: a message has a part of the type {brief(kind)}", "Only parts of text are supported."
            )
        return text

    def _parsed(self, tools: Any) -> list[Any]:
        """Tools are a list, or its JSON text."""
        if tools is None or tools == "":
            return []
        try:
            found = json.loads(tools) if isinstance(tools, str) else tools
        except ValueError:
            found = None
        if not isinstance(found, list):
            raise DataError(f"{self.place}: tools is not a list", "Write tools as a list of JSON schemas.")
        return found


def read_conversation(value: Any, conversation: Conversation) -> Conversation:
    """Add all messages of a list, which may also be JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise DataError(f"{conversation.place}: messages is not a list of objects", _HINT)
    for message in value:
        conversation.add(message)
    return conversation


def with_prompt(
    conversation: Conversation, prompt: Any, completion: Any = None, system: Any = None, history: Any = None
) -> Conversation:
    """Add a prompt and its completion with what goes before them.

    Args:
        conversation: to be added to.
        prompt: text, or a list of messages, which are not learned.
        completion: likewise; its messages are learned. None for a prompt to be answered.
        system: text of the system prompt, if there is one.
        history: earlier turns as pairs of question and answer.
    """
    if system:
        conversation.add({"role": "system", "content": system})
    for question, answer in _pairs(history, conversation.place):
        conversation.add({"role": "user", "content": question})
        conversation.add({"role": "assistant", "content": answer})
    for message in _messages(prompt, "user"):
        conversation.add(message, learned=False)
    if completion is not None:
        for message in _messages(completion, "assistant"):
            conversation.add(message)
    return conversation


def _messages(value: Any, role: str) -> Iterable[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _pairs(history: Any, place: str) -> Sequence[Any]:
    if history is None or history == "":
        return ()
    pairs = isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)
    if not pairs:
        raise DataError(f"{place}: history is not a list of pairs", "Write [[question, answer], ...].")
    found: list[Any] = history
    return found
