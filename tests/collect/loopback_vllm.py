"""A small server that speaks the part of `vllm serve` that a teacher needs, on loopback, with a real tiny model."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if think %}?{% endif %}{% endif %}"
)


class Loopback(ThreadingHTTPServer):
    """Answers `/health`, `/v1/models`, `/v1/completions` with `prompt_logprobs`, and `/tokenize`.

    `spoil` changes the answer to a completion before it is sent; `applies_temperature` is vLLM's
    `--logprobs-mode processed_logprobs`.
    """

    daemon_threads = True

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer = model, tokenizer
        self.applies_temperature = True
        self.max_model_len = 128
        self.can_tokenize = True
        self.spoil = lambda answer: answer
        self.requests: list[dict[str, Any]] = []
        self.busy = 0  # so many requests are answered 503 first

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def completions(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        temperature = request["temperature"] if self.applies_temperature else 1.0
        choices = []
        for index, ids in enumerate(request["prompt"]):
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1]
            logprobs = (logits / temperature).log_softmax(-1)
            entries: list[Any] = [None]
            for position, token in enumerate(ids[1:]):
                row = logprobs[position]
                best = row.topk(request["prompt_logprobs"]).indices.tolist()
                shown = {str(t): {"logprob": float(row[t]), "rank": 1 + int((row > row[t]).sum())} for t in best}
                shown[str(token)] = {"logprob": float(row[token]), "rank": 1 + int((row > row[token]).sum())}
                entries.append(shown)
            choices.append({"index": index, "text": "", "prompt_logprobs": entries})
        return self.spoil({"choices": choices})


class Handler(BaseHTTPRequestHandler):
    server: Loopback

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, {})
        elif self.path == "/v1/models":
            self._send(200, {"data": [{"id": "tiny", "max_model_len": self.server.max_model_len}]})
        else:
            self._send(404, {"error": "no such route"})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.busy > 0:
            self.server.busy -= 1
            self._send(503, {"error": "busy"})
        elif self.path == "/v1/completions":
            self._send(200, self.server.completions(request))
        elif self.path == "/tokenize" and self.server.can_tokenize:
            ids = self.server.tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]
            self._send(200, {"tokens": ids})
        else:
            self._send(404, {"error": "no such route"})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(model: Any, tokenizer: Any) -> Iterator[Loopback]:
    server = Loopback(model, tokenizer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
