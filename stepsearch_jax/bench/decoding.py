"""Decode and prefill speed beside transformers' generate and Tunix."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.bench import duel, peers, programs
from stepsearch_jax.models import decoder

_PROMPT, _CONTEXT = 128, 256
_TUNIX_GOALS = {8: "1.3, aim 1.5", 32: "1.5, aim 1.8"}  # By rows.


def _ours(params, config, rows: int, context: int) -> Callable:
  """A function (prompts [P, S], count) to sampled ids [P, count]."""
  compiled = programs.endless(config, rows, context)
  params = compiled.decode_params(params)
  key, block = jax.random.key(0), programs.BLOCK

  def generate(given, count):
    width = given.shape[1]
    chunk = programs.prompts(given, count, temperature=0.0)
    state = compiled.extend(params, compiled.init_state(), chunk, width)
    out = []
    for start in range(0, count, block):
      state, output = compiled.decode_block(
        params, state, key, width + start + block, block, leave=rows + 1
      )
      out.append(jax.device_get(output.tokens))
    return np.concatenate(out, axis=1)[:, :count]

  return generate


def _transformers(params, config, rows: int, context: int) -> Callable:
  import torch

  del rows, context
  model = peers.torch_policy(params, config)

  def generate(prompts, count):
    ids = torch.from_numpy(np.asarray(prompts, np.int64))
    with torch.inference_mode():
      out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
        min_new_tokens=count, do_sample=False,
      )
    return out[:, ids.shape[1] :].numpy()

  return generate


def _tunix(params, config, rows: int, context: int) -> Callable:
  del rows
  sample = peers.tunix_sampler(params, config, context)

  def generate(prompts, count):
    texts = [" ".join(map(str, row)) for row in prompts]
    out = sample(texts, max_generation_steps=count,
                 max_prompt_length=prompts.shape[1])
    return np.stack([np.asarray(row)[:count] for row in out.tokens])

  return generate


def _seconds(generate, prompts, count) -> tuple[np.ndarray, float]:
  began = time.perf_counter()
  out = generate(prompts, count)
  return out, time.perf_counter() - began


def _same(ours, theirs) -> None:
  """Greedy tokens agree but for near ties."""
  if ours.shape != theirs.shape:
    raise types.UserError(f"{ours.shape} tokens, the peer's {theirs.shape}")
  agree = (ours[:, 0] == theirs[:, 0]).mean()
  if agree < 0.9:
    raise types.UserError(
      f"first greedy tokens agree in {agree:.0%} of rows only"
    )


def duels(
  config: decoder.DecoderConfig, params: types.Tree
) -> Iterator[duel.Duel]:
  """Decoding at 8 and 32 rows, prefill of 8 x 512, beside each peer."""
  others = {"transformers generate": _transformers}
  if importlib.util.find_spec("tunix"):
    others["Tunix sampler"] = _tunix
  rng = np.random.default_rng(0)

  def prompts(rows, length):
    return rng.integers(1, config.vocab_size, (rows, length)).astype(np.int32)

  def decoding(generate, given):
    """The cost of all tokens but the first."""
    _, first = _seconds(generate, given, 1)
    out, whole = _seconds(generate, given, _CONTEXT - _PROMPT)
    return duel.Measured(out, whole - first)

  for rows in (8, 32):
    given = prompts(rows, _PROMPT)
    ours = _ours(params, config, rows, _CONTEXT)
    for peer, make in others.items():
      theirs = make(params, config, rows, _CONTEXT)
      yield duel.Duel(
        f"decode, {rows} rows", f"{_CONTEXT - _PROMPT} greedy tokens a row "
        f"behind prompts of {_PROMPT}", peer,
        lambda g=ours, p=given: decoding(g, p),
        lambda g=theirs, p=given: decoding(g, p), _same,
        goal=_TUNIX_GOALS[rows] if "Tunix" in peer else "1.3, aim 1.8",
        peer_warm_up=True,
      )
  given = prompts(8, 512)
  ours = _ours(params, config, 8, 1024)
  for peer, make in others.items():
    theirs = make(params, config, 8, 1024)
    yield duel.Duel(
      "prefill", "8 prompts of 512 and a token each", peer,
      lambda g=ours: g(given, 1), lambda g=theirs: g(given, 1), _same,
      goal="1.6" if "Tunix" in peer else "1.15", peer_warm_up=True,
    )
