"""Servers over the loopback interface that speak like vLLM and llama.cpp, with distributions that tests know."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

VOCABULARY = 12
ADAPTERS = ("mean", "sample-0", "sample-1", "sample-2")


def log_probs(adapter: int, prefix: list[int]) -> np.ndarray:
    """Of the next token, shape (V,)."""
    common = np.random.default_rng(prefix).normal(size=VOCABULARY)
    logits = 2 * common + np.random.default_rng([adapter, *prefix]).normal(size=VOCABULARY)
    return logits - np.log(np.exp(logits).sum())


@dataclass
class Fake:
    """What a server is told to do, and what it was asked."""

    kind: str
    failures: int = 0  # of the next requests
    delay: float = 0.0
    garbage: bool = False
    asked: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)
    scoring: threading.Lock = field(default_factory=threading.Lock)  # held while log-probabilities of a prompt are made

    def answer(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            base = {"id": "base", "owned_by": self.kind, "parent": None}
            adapters = [{"id": name, "owned_by": self.kind, "parent": "base"} for name in ADAPTERS]
            return {"data": [base, *(adapters if self.kind == "vllm" else [])]}
        if path == "/lora-adapters":
            return [{"id": i, "path": f"/files/{name}.gguf", "scale": 0.0} for i, name in enumerate(ADAPTERS)]
        if path == "/tokenize":
            text = body["prompt" if self.kind == "vllm" else "content"]
            special = body["add_special_tokens" if self.kind == "vllm" else "add_special"]
            return {"tokens": [*([0] if special else []), *(int(word) for word in text.split())]}
        return {"choices": [self.vllm(body) if self.kind == "vllm" else self.llamacpp(body)]}

    def top(self, values: np.ndarray, count: int) -> list[int]:
        return np.argsort(-values)[:count].tolist()

    def written(self, adapter: int, prompt: list[int], count: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < count:
            ids.append(int(log_probs(adapter, [*prompt, *ids]).argmax()))
        return ids

    def vllm(self, body: dict[str, Any]) -> dict[str, Any]:
        adapter, prompt = ADAPTERS.index(body["model"]), body["prompt"]
        ids = self.written(adapter, prompt, body["max_tokens"])
        answer = {"text": " ".join(map(str, ids)), "token_ids": ids if body.get("return_token_ids") else None}
        if "prompt_logprobs" in body:
            # vLLM may end where two adapters' are made in one batch (vllm-project/vllm issue 16668)
            assert self.scoring.acquire(blocking=False)
            time.sleep(0.01)
            self.scoring.release()
            positions: list[Any] = [None]
            for place in range(1, len(prompt)):
                values = log_probs(adapter, prompt[:place])
                named = {*self.top(values, body["prompt_logprobs"]), prompt[place]}
                positions.append(
                    {str(i): {"logprob": values[i], "rank": 1, "decoded_token": f" {i}"} for i in sorted(named)}
                )
            answer["prompt_logprobs"] = positions
        return answer

    def llamacpp(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["cache_prompt"] is False
        (adapter,) = [each["id"] for each in body["lora"] if each["scale"] == 1.0]
        content, prompt, forced = [], list(body["prompt"]), dict(body.get("logit_bias", []))
        for _ in range(body["max_tokens"]):
            values = log_probs(adapter, prompt)
            token = int((values + [forced.get(i, 0.0) for i in range(VOCABULARY)]).argmax())
            top = [{"id": i, "logprob": values[i]} for i in self.top(values, body["logprobs"])]
            content.append({"id": token, "token": f" {token}", "logprob": values[token], "top_logprobs": top})
            prompt.append(token)
        return {"text": "", "logprobs": {"content": content}}


@contextmanager
def fake_server(kind: str) -> Iterator[tuple[str, Fake]]:
    """The address of a server, and what tells it what to do."""
    fake = Fake(kind)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond(None)

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, body: Any) -> None:
            fake.asked.append((self.path, body, dict(self.headers)))
            time.sleep(fake.delay)
            status, text = 200, ""
            if fake.failures:
                fake.failures -= 1
                status, text = 503, "busy"
            elif fake.garbage:
                text = '{"choices": []}'
            elif body is not None and body.get("model", "base") not in ("base", *ADAPTERS):
                status, text = 400, f"no model {body['model']}"
            else:
                text = json.dumps(fake.answer(self.path, body))
            self.send_response(status)
            with contextlib.suppress(OSError):  # whoever asked may have gone
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
