"""The rollout suite: replayed workloads, decoding and prefill."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterator

import jax

from stepsearch_jax import types
from stepsearch_jax.bench import decoding, duel, peers, programs, workload
from stepsearch_jax.bench.replay import Ours, TurnByTurn
from stepsearch_jax.models import decoder


def _same(ours, theirs) -> None:
  if ours != theirs:
    raise types.UserError("the two did not ingest and sample the same counts")


def _replays(config, params, path) -> Iterator[duel.Duel]:
  recorded = workload.load(path, 32)
  template = workload.behind(recorded, workload.STEPSEARCH)
  grouped = workload.behind(recorded, workload.STEPSEARCH, rollouts=4)
  for replays, slots, goal in (
    (workload.load(path, 8), 8, "2.5, aim 3"), (recorded, 16, "2.5, aim 3"),
    (template, 16, "2.5, aim 3"), (grouped, 16, "2.8, aim 3.5"),
  ):
    yield duel.Duel(
      f"replay, {len(replays)} trajectories", workload.describe(replays),
      "turn by turn with transformers generate, with stops",
      Ours(config, params, replays, slots).play,
      TurnByTurn(config, params, replays).play, _same, goal=goal,
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

  yield duel.Reading(
    "share of the rollout that waits for a 50 ms retriever", work, waiting,
    goal="at most 0.05", warm_up=True,
  )
  engine = Ours(config, params, replays, 16)

  def overhead():
    engine.play()
    return engine.stats.decode_seconds / _bare_decode_seconds(engine)

  yield duel.Reading(
    "decode time of the engine / bare decode blocks", work, overhead,
    goal="at most 1.15", warm_up=True,
  )
  replays = workload.load(path, 64)
  # The schedule follows the lengths: any model has the same.
  small = dataclasses.replace(config, num_layers=1, vocab_size=256)
  many = Ours(small, peers.policy(small), replays, 16)

  def vacant():
    many.play()
    return many.stats.vacant_slot_steps / many.stats.slot_steps

  yield duel.Reading(
    "slot-steps of finished slots while questions wait",
    workload.describe(replays) + ", 16 slots", vacant, goal="at most 0.05",
  )


def _bare_decode_seconds(ours: Ours) -> float:
  """Seconds of the last play's decode steps, nothing around them.

  Full slots, as many steps at every length as the play had.
  """
  compiled, steps = ours.programs, collections.Counter()
  for kv_length, count in compiled.blocks:
    steps[kv_length] += int(count)
  params = compiled.decode_params(ours.params)
  seconds = 0.0
  for kv_length, count in steps.items():
    seconds += count * min(
      _seconds_a_step(compiled, params, kv_length) for _ in range(2)
    )
  return seconds


def _seconds_a_step(compiled, params, kv_length: int) -> float:
  block = programs.BLOCK
  state = programs.speaking(compiled, kv_length - block)
  jax.block_until_ready(state)
  began = time.perf_counter()
  _, output = compiled.decode_block(
    params, state, jax.random.key(0), kv_length, block,
    compiled.spec.slots + 1,
  )
  jax.block_until_ready(output)
  return (time.perf_counter() - began) / block


def duels(
  path: str | None, config: decoder.DecoderConfig | None = None
) -> Iterator[duel.Duel | duel.Reading]:
  """Rollouts, decoding and prefill of one model.

  Args:
    path: recorded workloads (JSON); None makes similar ones up.
    config: its shape; None is SmolLM2-135M's, float32.
  """
  config = config or peers.smollm2()
  params = peers.policy(config)
  yield from _replays(config, params, path)
  yield from _readings(config, params, path)
  yield from decoding.duels(config, params)
