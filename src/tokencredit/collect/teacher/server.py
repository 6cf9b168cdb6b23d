"""A teacher behind `vllm serve`, through the routes that TRL's client uses: `/v1/models` and `/v1/completions`.

The server sees token ids, never text, and returns the log-prob of each given token (`prompt_logprobs`): one number for
each, not the vocabulary.
"""

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.collect.rollout import takes
from tokencredit.collect.teacher.base import BaseTeacher, TeacherRequest
from tokencredit.collect.teacher.checks import PROBES, SHARED, _encode, check_chat, check_end, check_tokenizers, end_ids
from tokencredit.collect.teacher.probe import StartProbe
from tokencredit.collect.teacher.prompts import Row, check_fits
from tokencredit.collect.teacher.score import used_widths
from tokencredit.errors import TokenCreditError

ANSWER_BYTES = 1 << 30  # an answer larger than this is no list of log-probs
TEMPERATURE_PROBE = 2.0
BUSY = (502, 503, 504)
RETRY_AFTER = (1.0, 4.0)  # seconds


# What a request does not say, a server takes from the model's generation settings. Log-probs are those of the model
# only where nothing filters or penalises tokens.
PLAIN_SAMPLING: dict[str, Any] = {
    "n": 1,
    "top_k": -1,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
PLACEHOLDER = -1000.0  # servers write −inf as −9999 or another large number; no model means such a log-prob


class ServerTeacher(BaseTeacher):
    """Asks a server for the log-probs of prompt plus response, and keeps those of the response."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(given)
        self.url = str(given["url"]).rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise TokenCreditError(f"`url` of the teacher must start with http:// or https://, got {given['url']!r}")
        self.limit: int | None = given["max_length"]
        self._name: str | None = given["model"]
        self._probe = StartProbe()
        self._tempered: bool | None = None  # whether the server applies a temperature to what it returns

    @takes(TeacherRequest, after=1, positional=6)
    def score(self, request: TeacherRequest) -> Float[Tensor, "batch response"]:
        """ln π_T of the chosen tokens in nats, float32, 0 elsewhere."""
        ids, mask, temperature = request.response_ids, request.response_mask, request.temperature
        if self._student is None:
            self._find_model()
        if temperature != 1.0 and not self._tempered:
            raise self._untempered(temperature)
        prompts = self.prompts.prompts(request.rows, request.prompt_ids, self._student)
        widths = used_widths(mask)
        check_fits(prompts, widths, None if self.limit is None else self.limit - 1)  # the server generates one token
        sequences = [[*prompt, *row[:used]] for prompt, row, used in zip(prompts, ids.tolist(), widths, strict=True)]
        answers = self._ask_all(sequences, [len(prompt) for prompt in prompts], temperature)
        result = torch.full(ids.shape, torch.nan)
        for row, values in enumerate(answers):
            result[row, : len(values)] = torch.tensor(values, dtype=torch.float32)
        result = result.to(ids.device)
        self._check_complete(result, mask)
        scores = torch.where(mask, result, 0.0)
        self._probe(self.score, scores, request, self._student)
        return scores

    # -- start ---------------------------------------------------------------------------------------------------------

    def _check_student(self, tokenizer: Any, policy: Any, rows: Sequence[Row]) -> None:
        """Refuse a server that is away, and one of another vocabulary or EOS."""
        self._find_model()
        if self.given["tokenizer"] is not None:
            self._check_named_tokenizer(tokenizer, policy, rows)
        else:
            self._check_served_tokenizer(tokenizer)

    def _check_scores(self, tokenizer: Any, temperature: float) -> None:
        """Refuse a server that lacks a token, or ignores the temperature that is needed."""
        self._probe_ids(tokenizer)
        self._check_temperature(tokenizer, temperature)

    def _find_model(self) -> None:
        served = self._get("/v1/models").get("data")
        served = served if isinstance(served, list) else []
        names = [entry.get("id") for entry in served]
        if not names or (self._name is not None and self._name not in names):
            raise TokenCreditError(f"the teacher's server serves {names}, asked for {self._name or 'any'}")
        if self._name is None and len(names) > 1:
            raise TokenCreditError(f"the teacher's server serves {names}", hint="choose one: `model: …`")
        entry = served[names.index(self._name) if self._name else 0]
        self._name = entry["id"]
        self.limit = self.limit or entry.get("max_model_len")

    def _check_named_tokenizer(self, student: Any, policy: Any, rows: Sequence[Row]) -> None:
        from tokencredit.collect.load import load_tokenizer

        try:
            teacher = load_tokenizer(self.given["tokenizer"])
        except TokenCreditError as error:
            raise TokenCreditError(
                f"cannot load the teacher's tokenizer {self.given['tokenizer']!r}: {error.message}", hint=error.hint
            ) from error
        check_tokenizers(student, teacher)
        check_end(end_ids(student, policy), end_ids(teacher), student, self.given["eos"])
        check_chat(student, teacher, rows, self.given["chat_template_kwargs"], self.given["chat_template"])

    def _check_served_tokenizer(self, student: Any) -> None:
        """The server tokenizes the probe strings itself."""
        differ = []
        for text in PROBES:
            own = _encode(student, text)
            if isinstance(own, str):  # the student cannot write it, so it never will
                continue
            request: dict[str, Any] = {"model": self._name, "prompt": text, "add_special_tokens": False}
            try:
                other = self._post("/tokenize", request).get("tokens")
            except TokenCreditError as error:
                raise TokenCreditError(
                    f"the teacher's vocabulary cannot be compared: {error.message}",
                    hint="name its tokenizer: `tokenizer: folder or hub name`",
                ) from error
            if own != other:
                differ.append((text, own, other))
        if differ:
            text, own, other = differ[0]
            raise TokenCreditError(
                f"teacher and student do not share a tokenizer: {len(differ)} of {len(PROBES)} probe strings differ, "
                f"first {text!r}: student {own}, teacher {other}",
                hint=SHARED,
            )

    def _probe_ids(self, student: Any) -> None:
        """Every id that the student can sample must have a log-prob, its EOS and its last id among them."""
        ids = [0, max(student.get_vocab().values()), *end_ids(student)]
        (values,) = self._ask_all([[ids[0], *ids]], [1], 1.0)
        for number, value in zip(ids, values, strict=False):
            if not math.isfinite(value):
                raise TokenCreditError(
                    f"the teacher's server gives no log-prob for token {number}, {student.decode([number])!r}",
                    hint=SHARED,
                )
        if len(values) != len(ids):
            raise TokenCreditError(f"teacher returned {len(values)} of {len(ids)} log-probs for the start-up probe")

    def _check_temperature(self, student: Any, temperature: float) -> None:
        ids = sorted(student.get_vocab().values())[:16]
        plain, tempered = (self._ask_all([[ids[0], *ids]], [1], t)[0] for t in (1.0, TEMPERATURE_PROBE))
        moved = max(abs(a - b) for a, b in zip(plain, tempered, strict=True))
        self._tempered = moved > 1e-3
        if temperature != 1.0 and not self._tempered:
            raise self._untempered(temperature)

    def _untempered(self, temperature: float) -> TokenCreditError:
        return TokenCreditError(
            f"the student samples at temperature {temperature}, and the teacher's server is not known to apply one to "
            "the log-probs that it returns",
            hint="sample at temperature 1.0, or load the teacher here (`kind: model`): vLLM takes log-probs of prompts "
            "from raw logits, whatever its --logprobs-mode",
        )

    # -- requests ------------------------------------------------------------------------------------------------------

    def _ask_all(self, sequences: list[list[int]], prompt_lengths: list[int], temperature: float) -> list[list[float]]:
        """The log-probs behind each prompt, in requests of `batch_size` rows, `connections` at a time."""
        size = self.given["batch_size"]

        def ask(start: int) -> list[list[float]]:
            return self._ask(sequences[start : start + size], prompt_lengths[start : start + size], temperature)

        with ThreadPoolExecutor(max_workers=self.given["connections"]) as pool:
            return [row for part in pool.map(ask, range(0, len(sequences), size)) for row in part]

    def _ask(self, sequences: list[list[int]], prompt_lengths: list[int], temperature: float) -> list[list[float]]:
        request = {
            "model": self._name,
            "prompt": sequences,
            "max_tokens": 1,
            "temperature": temperature,
            "prompt_logprobs": 1,
            **PLAIN_SAMPLING,
        }
        choices = self._post("/v1/completions", request).get("choices")
        if not isinstance(choices, list) or len(choices) != len(sequences):
            got = len(choices) if isinstance(choices, list) else choices
            raise TokenCreditError(f"the teacher's server must answer {len(sequences)} choices, got {got!r}")
        ordered = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [
            sampled_logprobs(choice.get("prompt_logprobs"), sequence, length)
            for choice, sequence, length in zip(ordered, sequences, prompt_lengths, strict=True)
        ]

    def _check_complete(self, result: Tensor, mask: Tensor) -> None:
        for row in range(len(result)):
            have = int((torch.isfinite(result[row]) & mask[row]).sum())
            if have < int(mask[row].sum()):
                raise TokenCreditError(
                    f"teacher returned {have} of {int(mask[row].sum())} log-probs for response {row} of {len(result)}; "
                    "distillation needs one for every chosen token",
                    hint="look at the server's log: a length limit, or prefix caching that drops prompt log-probs",
                )

    def _get(self, route: str) -> dict[str, Any]:
        return self._send(urllib.request.Request(f"{self.url}{route}"))

    def _post(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(f"{self.url}{route}", data=data, headers=headers))

    def _send(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            found = json.loads(self._read(request))
        except urllib.error.HTTPError as error:
            text = error.read(500).decode(errors="replace").strip()
            raise TokenCreditError(
                f"the teacher's server answered {error.code} at {request.full_url}: {text}"
            ) from error
        except (OSError, ValueError) as error:
            raise TokenCreditError(
                f"no teacher at {request.full_url}: {error}",
                hint="start one: `vllm serve MODEL --max-logprobs -1`",
            ) from error
        if not isinstance(found, dict):
            raise TokenCreditError(f"the teacher's server must answer a JSON object, got {type(found).__name__}")
        return found

    def _read(self, request: urllib.request.Request) -> bytes:
        """One request, again after a pause where the server is busy for the moment."""
        for pause in (*RETRY_AFTER, None):
            try:
                with urllib.request.urlopen(request, timeout=self.given["timeout"]) as answer:
                    return bytes(answer.read(ANSWER_BYTES))
            except urllib.error.HTTPError as error:
                if error.code not in BUSY or pause is None:
                    raise
            except (ConnectionError, TimeoutError):
                if pause is None:
                    raise
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def sampled_logprobs(entries: Any, sequence: Sequence[int], prompt_length: int) -> list[float]:
    """The log-prob of each token of `sequence` from `prompt_length` on; NaN where the server gave none.

    Entry i belongs to token i given the tokens before it, so the first is empty and nothing is shifted afterwards.
    """
    if not isinstance(entries, list):
        raise TokenCreditError(
            f"the teacher's server returned no `prompt_logprobs`, got {entries!r}",
            hint="it must be vLLM's `vllm serve`",
        )
    values = []
    for position in range(prompt_length, min(len(entries), len(sequence))):
        shown = entries[position] if isinstance(entries[position], Mapping) else {}
        entry = shown.get(str(sequence[position]))
        entry = entry if isinstance(entry, Mapping) else {}
        values.append(_logprob(entry.get("logprob"), sequence[position]))
    return values


def _logprob(value: Any, token: int) -> float:
    """The number as a log-prob; NaN where there is none. Placeholders and positive numbers are refused."""
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        return math.nan
    if value <= PLACEHOLDER or value > 1e-3:
        raise TokenCreditError(
            f"the teacher's server gives token {token} the log-prob {value:g}, which stands for something else",
            hint="-9999 is vLLM's word for -inf: look for a top_k, a top_p or another filter in the server's settings "
            "(`--generation-config vllm` leaves the model's out)",
        )
    return float(value)
