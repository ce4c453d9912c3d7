"""JSON over HTTP with timeouts and retries, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ReadTimeoutError
from urllib3.util import Retry

from monteclora.errors import ConfigError, ServerError

__all__ = ["Connection"]

_BUSY = (408, 429, 500, 502, 503, 504)  # may pass by themselves


class Connection:
    """Requests to one server, from several threads.

    Args:
        url: of the server, with or without ``/v1`` at its end.
        timeout: seconds without an answer before a request has failed.
        retries: how often a request is sent again that found no connection, or a server that is busy or failing; with
            pauses that double from half a second on.
        api_key: sent as a bearer token.
    """

    def __init__(self, url: str, timeout: float, retries: int, api_key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the server's address is {url!r}, expected a URL", "Write http://localhost:8000.")
        if timeout <= 0 or retries < 0:
            raise ConfigError(f"timeout is {timeout} and retries is {retries}", "Use seconds above 0, and 0 or more.")
        self.root = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        self._session = requests.Session()
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"
        # asking a model twice changes nothing, so that requests of every kind are sent again
        retry = Retry(retries, backoff_factor=0.5, status_forcelist=_BUSY, allowed_methods=None, raise_on_status=False)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=64))

    def get(self, path: str) -> Any:
        """The document at a path. Raises ServerError."""
        return self._send("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a document. Raises ServerError."""
        return self._send("POST", path, body)

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        url = f"{self.root}{path}"
        try:
            answer = self._session.request(method, url, json=body, timeout=self.timeout)
        except requests.RequestException as error:
            if _is_timeout(error):
                late = f"{url} did not answer within {self.timeout:g} s"
                raise ServerError(late, "Allow more with timeout.") from None
            reason = " ".join(str(error).split())[:200]
            hint = "Start the server, or correct its address."
            raise ServerError(f"{url} cannot be reached: {reason}", hint) from None
        if not answer.ok:
            said = " ".join(answer.text.split())[:300]
            raise ServerError(f"{url} answered {answer.status_code}: {said}", "See the server's log.")
        try:
            return answer.json()
        except ValueError:
            raise ServerError(f"{url} answered something that is not JSON", "Check that it is the server.") from None


def _is_timeout(error: requests.RequestException) -> bool:
    """Whether a connection was made and no answer came: after repetitions it has another name."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    return isinstance(error, requests.Timeout) or isinstance(reason, ReadTimeoutError)
