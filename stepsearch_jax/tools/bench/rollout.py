"""The rollout suite: replayed workloads, decoding and prefill."""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax
import numpy as np

from stepsearch_jax import sharding
from stepsearch_jax.rollout import sampler
from stepsearch_jax.tools.bench import decoding, duel, peers, workload
from stepsearch_jax.tools.bench.replay import Ours, TurnByTurn


def _same(ours, theirs) -> None:
  if ours != theirs:
    raise ValueError("the two did not ingest and sample the same counts")


def _replays(config, params, path) -> Iterator[duel.Duel]:
  for count, slots in ((8, 8), (32, 16)):
    replays = workload.load(path, count)
    yield duel.Duel(
      f"replay, {count} trajectories", workload.describe(replays),
      "turn by turn with transformers generate, with stops",
      Ours(config, params, replays, slots).play,
      TurnByTurn(config, params, replays).play, _same, goal="1.8, aim 2.5",
    )
  replays = workload.load(path, 8)
  yield duel.Duel(
    "replay, 8 trajectories", workload.describe(replays),
    "as released: 800 tokens a turn, no stops",
    Ours(config, params, replays, 8).play,
    TurnByTurn(config, params, replays, fixed=800).play, _same, goal="5",
    warm_up=False,
  )


def _readings(config, params, path) -> Iterator[duel.Reading]:
  replays = workload.load(path, 32)
  work = workload.describe(replays) + ", 16 slots"
  slow = Ours(config, params, replays, 16, delay=0.05, retrieval_delay=4)

  def waiting():
    slow.play()
    return slow.stats.retrieval_wait_seconds / slow.stats.seconds

  slow.play()
  yield duel.Reading(
    "share of the rollout that waits for a 50 ms retriever", work, waiting,
    goal="at most 0.05",
  )
  engine = Ours(config, params, replays, 16)
  engine.play()

  def overhead():
    engine.play()
    stats = engine.stats
    bare = _bare_decode_seconds(config, params, 16, stats.decode_steps)
    return stats.decode_seconds / bare

  yield duel.Reading(
    "decode time of the engine / bare decode blocks", work, overhead,
    goal="at most 1.15",
  )
  replays = workload.load(path, 64)
  many = Ours(config, params, replays, 16)

  def vacant():
    many.play()
    return many.stats.vacant_slot_steps / many.stats.slot_steps

  yield duel.Reading(
    "slot-steps of finished slots while questions wait",
    workload.describe(replays) + ", 16 slots", vacant, goal="at most 0.05",
  )


def _bare_decode_seconds(config, params, slots: int, steps: int) -> float:
  """Seconds of so many decode steps over full slots, nothing around them."""
  length = 1024
  programs = sampler.Sampler(
    config, sampler.SamplerSpec(slots, 2 * length, block=32),
    np.zeros((1, config.vocab_size), np.int32), 1, sharding.make_mesh(),
  )
  ready = programs.decode_params(params)
  state = programs.init_state().replace(
    position=np.full(slots, length - 64, np.int32),
    active=np.ones(slots, bool),
    budget=np.full(slots, 1 << 30, np.int32),
    temperature=np.ones(slots, np.float32),
  )
  key = jax.random.key(0)
  seconds = 0.0
  for turn in range(3):
    began = time.perf_counter()
    state, output = programs.decode_block(
      ready, state, key, length, 32, slots + 1
    )
    jax.block_until_ready(output)
    seconds += (time.perf_counter() - began) * (turn > 0)
    state = state.replace(position=state.position - 32)
  return seconds / 64 * steps


def duels(path: str | None) -> Iterator[duel.Duel | duel.Reading]:
  """Rollouts, decoding and prefill of SmolLM2-135M, float32.

  Args:
    path: recorded workloads (JSON); None makes similar ones up.
  """
  config = peers.smollm2()
  params = peers.policy(config)
  yield from _replays(config, params, path)
  yield from _readings(config, params, path)
  yield from decoding.duels()
