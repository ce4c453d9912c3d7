"""Conversations as the chat template writes them, in pieces that are learned and pieces that are not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monteclora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHATML", "Segment", "Writer", "Written", "use_template"]

Segment = tuple[str, bool]

CHATML = "chatml"
"""The name of the template that :func:`use_template` knows."""

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + 'END' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PROBE = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
    {"role": "user", "content": "another question"},
]


@dataclass(frozen=True)
class Written:
    """A row as text.

    Attributes:
        segments: in their order, each with whether it is learned.
        start: where the prompt's own text begins, in characters of the first segment: after the system prompt.
        asking: the segment that asks for the last answer that is learned.
        end: where the prompt's own text ends, in characters of that segment.
        templated: whether a chat template wrote it, which then writes a beginning-of-sequence token where there is one.
    """

    segments: tuple[Segment, ...]
    start: int
    asking: int
    end: int
    templated: bool = False


def use_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give the tokenizer another chat template.

    Args:
        tokenizer: to be changed.
        template: the path of a Jinja file, or ``chatml``, which ends turns with ``<|im_end|>`` if the vocabulary has it
            (and makes it the end-of-sequence token), else with the end-of-sequence token.

    Raises:
        ConfigError: there is no such file, or the tokenizer has no token to end a turn with.
    """
    if template != CHATML:
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(
                f"cannot read the chat template {template}: {reason}", "Give the path of a Jinja file, or chatml."
            ) from None
        return
    if "<|im_end|>" in tokenizer.get_vocab():
        tokenizer.eos_token = "<|im_end|>"
    if tokenizer.eos_token is None:
        raise ConfigError("the model's tokenizer has no end-of-sequence token", "Use another model.")
    tokenizer.chat_template = _CHATML.replace("END", tokenizer.eos_token)


@dataclass(frozen=True)
class Writer:
    """Writes rows as a model reads them.

    Attributes:
        tokenizer: whose chat template is used, if it has one; without one a line break parts prompt and completion.
    """

    tokenizer: PreTrainedTokenizerBase

    def row(self, row: dict[str, Any]) -> Written:
        """The text of a row with an answer.

        Args:
            row: ``prompt`` and ``completion``; ``completion`` alone, of a corpus; or ``messages``, perhaps with
                ``extra``, see :mod:`monteclora.data.conversations`.

        Raises:
            ConfigError: the template does not tell what is learned, or there is none for a conversation.
            jinja2.TemplateError: the conversation does not fit the template.
        """
        corpus = "completion" in row and "prompt" not in row
        if corpus or not self.tokenizer.chat_template:
            prompt = "" if corpus else _plain_prompt(row)
            if self.tokenizer.eos_token is None:
                raise ConfigError("the model's tokenizer has no end-of-sequence token", "Use another model.")
            asking = "" if corpus else prompt + "\n"
            segments = ((asking, False), (row["completion"], True), (self.tokenizer.eos_token, True))
            return Written(segments, 0, 0, len(prompt))
        return self._turns(*_conversation(row))

    def prompt(self, row: dict[str, Any]) -> Written:
        """The text that asks for an answer: of ``prompt``, or of ``messages`` without the answer they may end with."""
        if not self.tokenizer.chat_template:
            prompt = _plain_prompt(row)
            return Written(((prompt + "\n", False),), 0, 0, len(prompt))
        messages, _, tools = _conversation(row)
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        text = self._render(messages, tools, prompt=True)
        return Written(((text, False),), _text_start(text, messages), 0, _text_end(text, messages), templated=True)

    def _turns(self, messages: list[dict[str, Any]], learned: Sequence[bool], tools: list[Any] | None) -> Written:
        """The learned turns with their ends, and what lies between them."""
        segments: list[Segment] = []
        done = ""
        asking = end = 0
        for number, is_learned in enumerate(learned):
            if not is_learned:
                continue
            before = self._render(messages[:number], tools, prompt=True)
            after = self._render(messages[: number + 1], tools, prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise _rewritten(sum(message["role"] == "assistant" for message in messages))
            turn = after[len(before) :]
            if self._appends_prompt:
                turn = self._until_its_end(turn)
            # Templates put a line break after the end of a turn; nothing ever generates it.
            answer = turn.rstrip()
            asking, end = len(segments), _text_end(before, messages[:number]) - len(done)
            segments += [(before[len(done) :], False), (answer, True), (turn[len(answer) :], False)]
            done = before + turn
        start = _text_start(segments[0][0], messages) if segments else 0
        return Written(tuple(segments), start, asking, max(end, 0), templated=True)

    @cached_property
    def _appends_prompt(self) -> bool:
        """Whether the template asks for the next answer after every conversation, even where it is asked not to."""
        import jinja2

        try:
            asked, told_not_to = (self._render(_PROBE[:1], None, prompt=prompt) for prompt in (True, False))
            answered, continued = (self._render(_PROBE[:n], None, prompt=False) for n in (2, 3))
        except jinja2.TemplateError:
            return False  # the rows will tell
        answer = answered.partition(_PROBE[1]["content"])
        rewrites = not continued.startswith(answer[0] + answer[1])
        return asked == told_not_to and not rewrites and not continued.startswith(answered)

    def _until_its_end(self, turn: str) -> str:
        """A turn without the request for the next one after its end-of-sequence token."""
        end = self.tokenizer.eos_token
        if not end or end not in turn:
            raise ConfigError(
                "the model's chat template asks for the next answer after every answer, the end of an answer is "
                "unknown",
                "Set data.chat_template to chatml, or to the file of a template that heeds add_generation_prompt.",
            )
        return turn[: turn.index(end) + len(end)]

    def _render(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> str:
        options: dict[str, Any] = {"tools": tools} if tools else {}
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **options
        )
        return str(text)


def _plain_prompt(row: dict[str, Any]) -> str:
    if "messages" in row:
        raise ConfigError(
            "the data holds conversations and the model's tokenizer has no chat template",
            "Use an instruction-tuned model, set data.chat_template to chatml, or give prompt and completion columns.",
        )
    return str(row["prompt"])


def _conversation(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[bool], list[Any] | None]:
    """Messages, which of them are learned, and the tools that the model may call."""
    if not row.get("messages"):
        answer = [{"role": "assistant", "content": row["completion"]}] if row.get("completion") else []
        return [{"role": "user", "content": row["prompt"]}, *answer], [False, True], None
    extra = json.loads(row["extra"]) if row.get("extra") else {}
    more = extra.get("messages") or [{}] * len(row["messages"])
    messages = [{**message, **fields} for message, fields in zip(row["messages"], more, strict=True)]
    unlearned = set(extra.get("unlearned", ()))
    learned = [message["role"] == "assistant" and n not in unlearned for n, message in enumerate(messages)]
    return messages, learned, extra.get("tools")


def _text_start(text: str, messages: Sequence[dict[str, Any]]) -> int:
    """Where the first message that is not the system's stands in ``text``; 0 where the template changes it."""
    position = 0
    for message in messages:
        content = message["content"].strip()
        found = text.find(content, position)
        if message["role"] != "system":
            return max(found, 0)
        position = found + len(content) if found >= 0 else position
    return 0


def _text_end(text: str, messages: Sequence[dict[str, Any]]) -> int:
    """Where the last message ends in ``text``; its length where the template changes it."""
    content = messages[-1]["content"].strip() if messages else ""
    found = text.rfind(content)
    return found + len(content) if found >= 0 else len(text)


def _rewritten(answers: int) -> ConfigError:
    template = "et data.chat_template to chatml, or to the file of a template that writes answers as they are."
    if answers == 1:
        return ConfigError(
            "the model's chat template writes an answer otherwise than it asks for it, as those that strip thoughts do",
            f"S{template}",
        )
    return ConfigError(
        "the model's chat template rewrites earlier turns, the tokens to learn are unknown",
        f"Use one prompt and one completion a row, or s{template}",
    )
