"""An OpenAI-compatible model as a second opinion: it may add candidates and reorder the best five, nothing more."""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.errors import TokenCreditError
from tokencredit.files import make_folder, read_json, write_json
from tokencredit.recipes.evaluate.history import Evaluation, usable
from tokencredit.recipes.pool.lines import append, json_line
from tokencredit.recipes.program.operators.table import OPERATORS
from tokencredit.recipes.program.recipe import Recipe, accepted, as_mappings, make_recipe, make_step
from tokencredit.recipes.search.config import LLMSettings
from tokencredit.recipes.search.policies import Candidate, Choice, Chooser, improvements, score

TOP = 5
ASKED = 5
TEMPERATURES = {"propose": (0.9, 0.3), "rank": (0.6, 0.3)}


class _BadAnswer(Exception):
    """The model's answer cannot be used; the text says why."""


@dataclass(slots=True, kw_only=True, eq=False)
class Adviser:
    """Asks, checks every word of the answer against the operator table, and falls back to the search without it.

    Requests and replies are kept by hash in `folder`, so resume and replay need no network. `counts` goes into the
    report: asked, cached, fallback, dropped, clamped.
    """

    settings: LLMSettings
    folder: Path
    counts: dict[str, int] = field(default_factory=dict)

    def advise(self, chooser: Chooser, history: Sequence[Evaluation], choice: Choice) -> Choice:
        """Add the model's recipes to what was considered, and let it order the best."""
        good = usable(history)
        if not good:
            return choice
        candidates = list(choice.considered)
        if "propose" in self.settings.roles:
            recipes = self._ask("propose", self._facts(chooser, history), self._read_proposals) or []
            candidates += [chooser.materialise(recipe) for recipe in recipes]
        open_candidates = [candidate for candidate in candidates if not candidate.why]
        if not open_candidates:
            return Choice(choice.candidate, candidates)
        scored = score(chooser, good, open_candidates)
        order = np.argsort(-improvements(chooser, good, scored), kind="stable")[:TOP]
        best = [scored[index] for index in order.tolist()]
        if "rank" in self.settings.roles and len(best) > 1:
            facts = self._facts(chooser, history) | {"candidates": [_describe(candidate) for candidate in best]}
            places = self._ask("rank", facts, lambda answer: _read_ranking(answer, len(best)))
            best = best if places is None else [best[place] for place in places]
        return Choice(best[0], [candidate for candidate in candidates if candidate.why] + scored)

    def _facts(self, chooser: Chooser, history: Sequence[Evaluation]) -> dict[str, Any]:
        """What the model sees: names and numbers; text of samples only if the settings say so."""
        space = chooser.space
        facts: dict[str, Any] = {
            "slot": len(history) + 1,
            "budget": chooser.config.search.budget,
            "pool_samples": space.samples,
            "operators": {op: sorted(accepted(op)) for op in space.operators},
            "signals": {"top": list(space.scalars), "top_union": list(space.relevance)},
            "seed_of_random_k": space.seed,
            "history": [
                {"recipe": e.steps, "score": e.score, "samples": e.samples, "state": e.state} for e in usable(history)
            ],
        }
        if self.settings.show_samples and chooser.executor.materials.pool.folder is not None:
            first = np.arange(min(3, space.samples), dtype=np.int32)
            facts["samples"] = [s["messages"] for s in chooser.executor.materials.pool.samples(first)]
        return facts

    def _ask(self, role: str, facts: dict[str, Any], read: Any) -> Any:
        """One request and one retry; None where neither answer can be used."""
        for temperature in TEMPERATURES[role]:
            body = {
                "model": self.settings.model,
                "temperature": temperature,
                "messages": [
                    {"role": "system", "content": PROMPTS[role]},
                    {"role": "user", "content": json.dumps(facts, sort_keys=True, ensure_ascii=False)},
                ],
            }
            try:
                return read(self._reply(body))
            except _BadAnswer as error:
                self._count("bad_answers")
                self._log({"role": role, "problem": str(error)})
        self._count("fallback")
        return None

    def _reply(self, body: dict[str, Any]) -> Any:
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        path = self.folder / "llm" / f"{key[:32]}.json"
        if path.is_file():
            self._count("cached")
            try:
                text = str(read_json(path)["reply"])
            except (KeyError, TypeError) as error:
                raise TokenCreditError(f"{path} is not a kept reply", hint="remove it to ask again") from error
        else:
            self._count("asked")
            text = _post(body, self.settings.timeout)
            make_folder(path.parent)
            write_json(path, {"request": body, "reply": text})
        return _json_in(text)

    def _read_proposals(self, answer: Any) -> list[Recipe]:
        if not isinstance(answer, list) or not answer:
            raise _BadAnswer("expected a list of recipes")
        recipes = []
        for steps in answer[:ASKED]:
            try:
                recipes.append(make_recipe([self._clamped(step) for step in steps]))
            except (TokenCreditError, TypeError, KeyError, AttributeError) as error:
                self._count("dropped")
                self._log({"role": "propose", "dropped": steps, "problem": str(error).split("\n")[0]})
        if not recipes:
            raise _BadAnswer("no recipe of the answer is valid")
        return recipes

    def _clamped(self, step: dict[str, Any]) -> Any:
        params = {name: value for name, value in step.items() if name != "op"}
        bounds = OPERATORS[step["op"]].search if str(step["op"]) in OPERATORS else None
        for name in ("fraction", "cosine", "jaccard"):
            value = params.get(name)
            if bounds and isinstance(value, int | float) and not bounds[0] <= value <= bounds[1]:
                params[name] = min(max(value, bounds[0]), bounds[1])
                self._count("clamped")
        return make_step(step["op"], **params)

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def _log(self, line: dict[str, Any]) -> None:
        append(make_folder(self.folder / "llm") / "problems.jsonl", json_line(line))


PROMPTS = {
    "propose": "You propose data recipes: ordered programs of filters, dedups and sampling on one fixed pool. "
    "Answer with JSON alone: a list of up to five recipes, each a list of steps such as "
    '{"op": "top", "signal": "ifd", "fraction": 0.7}. Use only the operators, parameters and signals given. At least '
    "one recipe must keep more samples than the best so far and one must keep fewer. A fraction of 0.7 keeps the best "
    "70 % of the current set; a higher cosine of semdedup removes less.",
    "rank": "You choose the recipe to evaluate next. Mean and sd are a surrogate's forecast. Answer with JSON alone: "
    "the indices of all candidates from 0, best first.",
}


def _describe(candidate: Candidate) -> dict[str, Any]:
    assert candidate.subset is not None
    facts = {"mean": candidate.mean, "sd": candidate.sd, "samples": len(candidate.subset), "state": candidate.state}
    return {"recipe": as_mappings(candidate.recipe), **facts}


def _read_ranking(answer: Any, count: int) -> list[int]:
    if not isinstance(answer, list) or sorted(map(str, answer)) != sorted(map(str, range(count))):
        raise _BadAnswer(f"expected a permutation of 0…{count - 1}, got {answer!r}")
    return [int(index) for index in answer]


def _json_in(text: str) -> Any:
    """The JSON value of an answer, inside a code fence or behind a chain of thought too."""
    text = text.rsplit("</think>", 1)[-1]
    start = min((place for place in (text.find("["), text.find("{")) if place >= 0), default=-1)
    if start < 0:
        raise _BadAnswer("no JSON in the answer")
    try:
        return json.JSONDecoder().raw_decode(text[start:])[0]
    except (ValueError, RecursionError) as error:
        raise _BadAnswer(f"not JSON: {error}") from error


def _post(body: dict[str, Any], timeout: float) -> str:
    base = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    request = urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode(), headers)
    for attempt in range(2):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return str(json.loads(response.read())["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            if error.code in {401, 403, 404}:
                raise TokenCreditError(
                    f"{base} answered {error.code} for model {body['model']!r}",
                    hint="check OPENAI_BASE_URL, OPENAI_API_KEY and `llm.model`",
                ) from error
            problem: Exception = error
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            problem = error
        if attempt == 0:
            time.sleep(1.0)
    raise _BadAnswer(f"no answer from {base}: {problem}")
