"""Language models that write queries: local, or behind an endpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.env import search_env
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.models.weights import hf as hf_weights
from stepsearch_jax.parallel import sharding
from stepsearch_jax.retrieval import remote
from stepsearch_jax.rollout import (
  automaton,
  engine,
  programs,
  records,
  text_side,
)


class _OneTurn:
  """An environment in which the first turn is the answer."""

  topk = 1

  def prompt(self, question: types.Question) -> str:
    return question.text

  def step(self, text: str, turn: int) -> search_env.Step:
    del turn
    return search_env.Step(text, types.Action.ANSWER, text, done=True)


class LocalWriter:
  """Completes prompts with a local model, through the rollout engine."""

  def __init__(
    self, reference: str, max_tokens: int = 64, temperature: float = 0.0,
    slots: int = 16, context: int = 512, dtype: str = "float32",
  ):
    """Loads a model.

    Args:
      reference: HF folder or id, *.gguf, or package:<name>.
      max_tokens: longest completion.
      temperature: 0 for greedy.
      slots: prompts completed side by side.
      context: tokens of prompt and completion.
      dtype: compute type.
    """
    self.name = f"{reference} t={temperature:g} n={max_tokens}"
    tokenizer = tokenizer_lib.load(reference)
    path = hf_weights.resolve(reference)
    config = dataclasses.replace(
      hf_weights.load_config(path), dtype=jnp.dtype(dtype)
    )
    self._params = hf_weights.load_policy(path, config)
    self._temperature = temperature
    stops = automaton.build_automaton(
      tokenizer.token_bytes(), ("\n\n",), tokenizer.eos_ids
    )
    table = automaton.pad_vocabulary(stops.table, config.vocab_size)
    shape = programs.ProgramSpec(slots, context, block=16, top_k=0, top_p=1.0)
    compiled = programs.RolloutPrograms(
      config, shape, table, stops.first_stop, sharding.make_mesh()
    )
    limits = records.EngineSpec(
      max_prompt=context - max_tokens, max_turn=max_tokens,
      max_observation=context, answer_room=max_tokens, retrieval_delay=1,
      search_threads=1, extend_rows=(slots,), extend_tokens=(64, 128),
      probe=None,
    )
    env = cast(search_env.SearchEnv, _OneTurn())
    self._engine = engine.Engine(
      compiled, text_side.TextSide(env, tokenizer), None, limits, seed=0
    )
    self._params = jax.device_put(self._params)

  def write(self, prompts: Sequence[str]) -> list[str]:
    """See `pipeline.Writer.write`."""
    asked = [types.Question(str(i), p, ("-",)) for i, p in enumerate(prompts)]
    played = self._engine.run(
      self._params, asked, range(len(asked)), self._temperature
    )
    return [done.turns[-1].text for done in played.trajectories]


class EndpointWriter:
  """Completes prompts through an OpenAI-compatible chat endpoint.

  The key, if one is needed, comes from OPENAI_API_KEY and is never logged.
  """

  batch = 1  # So that every paid answer is stored at once.
  at_once = 8

  def __init__(
    self, url: str, model: str, max_tokens: int = 128, temperature: float = 0.0,
    spec: remote.RemoteSpec = remote.PATIENCE, **testing: Callable,
  ):
    """Prepares a client.

    Args:
      url: base URL, for instance http://127.0.0.1:8000/v1.
      model: name of the model there.
      max_tokens: longest completion.
      temperature: 0 for greedy.
      spec: patience.
      **testing: sleep and clock of `remote.PatientClient`.
    """
    self.name = (
      f"{remote.public_url(url)} {model} t={temperature:g} n={max_tokens}"
    )
    key = os.environ.get("OPENAI_API_KEY", "")
    self._client = remote.PatientClient(
      url.rstrip("/") + "/chat/completions", spec,
      {"Authorization": f"Bearer {key}"} if key else None, **testing,
    )
    self._fixed = {
      "model": model, "max_tokens": max_tokens, "temperature": temperature
    }

  def write(self, prompts: Sequence[str]) -> list[str]:
    """See `pipeline.Writer.write`; one request per prompt.

    Raises:
      SearchError: the endpoint failed for good.
    """
    return [self._ask(prompt) for prompt in prompts]

  def _ask(self, prompt: str) -> str:
    return self._client.post(
      {**self._fixed, "messages": [{"role": "user", "content": prompt}]},
      lambda body: str(body["choices"][0]["message"]["content"]),
    )
