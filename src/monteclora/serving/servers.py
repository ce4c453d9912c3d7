"""What servers are asked, each in its own words.

Both have OpenAI's ``/v1/completions`` with token ids as prompt. They differ in how an adapter is named, and in how the
log-probability of a *given* token is had: vLLM returns those of the prompt's tokens; llama.cpp returns those of tokens
that it writes, and writes the token that it is told to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from threading import Lock
from typing import Any, Protocol

from monteclora.errors import ConfigError, MonteCLoRAError, ServerError
from monteclora.serving.http import Connection

__all__ = ["LlamaCpp", "Position", "Server", "Vllm", "connected", "understood"]

_FORCED = 1e4  # what is added to the logit of the token to be written; returned log-probabilities are without it


@dataclass(frozen=True)
class Position:
    """What one adapter says of one token of a text.

    Attributes:
        text: the token, as the server writes it.
        log_prob: of the token.
        top: log-probabilities of the likeliest tokens, by id.
    """

    text: str
    log_prob: float
    top: Mapping[int, float]


class Server(Protocol):
    """A kind of server."""

    def adapters(self) -> list[str]:
        """Names of those that it has."""
        ...

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text; ``special`` adds what the tokenizer puts around a whole text."""
        ...

    def score(self, adapter: str, prompt: Sequence[int], text: Sequence[int], top: int) -> list[Position]:
        """The tokens of a text behind a prompt."""
        ...

    def complete(self, adapter: str, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], str]:
        """What an adapter writes behind a prompt by its most probable tokens, in ids and as text."""
        ...


@dataclass(frozen=True)
class Vllm:
    """vLLM's server: an adapter is a model (``--lora-modules NAME=FOLDER``).

    Log-probabilities of a prompt are asked for one request at a time: of several adapters in one batch, vLLM takes the
    rows of one for another's and may end with an error of shapes (https://github.com/vllm-project/vllm/issues/16668).
    """

    connection: Connection
    _alone: Lock = field(default_factory=Lock, compare=False, repr=False)

    def adapters(self) -> list[str]:
        """See :class:`Server`."""
        return [str(model["id"]) for model in self.connection.get("/v1/models")["data"] if model.get("parent")]

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """See :class:`Server`."""
        return list(self.connection.post("/tokenize", {"prompt": text, "add_special_tokens": special})["tokens"])

    def score(self, adapter: str, prompt: Sequence[int], text: Sequence[int], top: int) -> list[Position]:
        """See :class:`Server`; one request."""
        body = {
            "model": adapter,
            "prompt": [*prompt, *text],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": top,
        }
        with self._alone:
            answer = self.connection.post("/v1/completions", body)
        found = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
        positions = []
        for token, known in zip(text, found, strict=True):
            by_id = {int(name): each for name, each in known.items()}
            top_log_probs = {name: float(each["logprob"]) for name, each in by_id.items()}
            positions.append(Position(by_id[token].get("decoded_token") or "", top_log_probs[token], top_log_probs))
        return positions

    def complete(self, adapter: str, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], str]:
        """See :class:`Server`."""
        body = {
            "model": adapter,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        choice = self.connection.post("/v1/completions", body)["choices"][0]
        return list(choice["token_ids"]), str(choice["text"])


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's server: adapters are files (``--lora FILE --lora-init-without-apply``), one a request.

    Its prompt cache is switched off: it hands keys and values of one adapter to requests for another
    (https://github.com/ggml-org/llama.cpp/issues/26207).
    """

    connection: Connection

    def adapters(self) -> list[str]:
        """See :class:`Server`: the names of the files without their endings."""
        return list(self._ids())

    def _ids(self) -> dict[str, int]:
        there = self.connection.get("/lora-adapters")
        ids = {PurePath(each["path"]).stem: int(each["id"]) for each in there}
        if len(ids) < len(there):
            raise ConfigError("two of the server's adapters have the same file name", "Give each file its own name.")
        return ids

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """See :class:`Server`."""
        body = {"content": text, "add_special": special, "parse_special": True}
        return list(self.connection.post("/tokenize", body)["tokens"])

    def score(self, adapter: str, prompt: Sequence[int], text: Sequence[int], top: int) -> list[Position]:
        """See :class:`Server`; a request for each token."""
        body, positions = self._body(adapter), []
        for place, token in enumerate(text):
            asked = {
                **body,
                "prompt": [*prompt, *text[:place]],
                "max_tokens": 1,
                "logprobs": top,
                "logit_bias": [[token, _FORCED]],
            }
            (said,) = self._content(asked)
            if said["id"] != token:
                raise ServerError(
                    f"the server wrote token {said['id']} where {token} was forced", "Use a newer llama.cpp."
                )
            log_probs = {int(each["id"]): float(each["logprob"]) for each in said["top_logprobs"]}
            positions.append(Position(str(said["token"]), float(said["logprob"]), log_probs))
        return positions

    def complete(self, adapter: str, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], str]:
        """See :class:`Server`."""
        asked = {**self._body(adapter), "prompt": list(prompt), "max_tokens": max_tokens, "logprobs": 1}
        content = self._content(asked)
        return [int(each["id"]) for each in content], "".join(str(each["token"]) for each in content)

    def _body(self, adapter: str) -> dict[str, Any]:
        ids = self._ids()
        if adapter not in ids:  # the server would answer with the base model
            raise ConfigError(f"the server has no adapter {adapter!r}; it has {', '.join(ids)}", "Name one of them.")
        lora = [{"id": number, "scale": float(name == adapter)} for name, number in ids.items()]
        return {"lora": lora, "temperature": 0, "cache_prompt": False}

    def _content(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        logprobs = self.connection.post("/v1/completions", body)["choices"][0]["logprobs"]
        return list(logprobs["content"]) if logprobs else []


_KINDS: Mapping[str, Callable[[Connection], Server]] = {"vllm": Vllm, "llamacpp": LlamaCpp}


@contextmanager
def understood(connection: Connection) -> Iterator[None]:
    """Raises ServerError for an answer that has another form than the block expects."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, MonteCLoRAError):
            raise
        raise ServerError(
            f"{connection.root} answered in a form that is not known ({type(error).__name__}: {error})",
            "Check its version, and that kind is what it is.",
        ) from error


def connected(connection: Connection, kind: str | None) -> Server:
    """The server behind a connection, of the given kind, or of the one that it says it is.

    Raises:
        ConfigError: no such kind is known.
        ServerError: it cannot be asked.
    """
    if kind is None:
        with understood(connection):
            kind = str(connection.get("/v1/models")["data"][0]["owned_by"])
        if kind not in _KINDS:
            raise ConfigError(
                f"{connection.root} is a server of the kind {kind!r}, which is not known",
                f"Name the kind that it behaves like: {', '.join(_KINDS)}.",
            )
    elif kind not in _KINDS:
        raise ConfigError(f"kind is {kind!r}, expected one of {', '.join(_KINDS)}", "Leave it out to have it found.")
    return _KINDS[kind](connection)
