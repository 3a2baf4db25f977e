"""The shares of an accelerator's peaks that update, prefill and decode reach.

Model FLOPs are counted, not the hardware's: rematerialisation and padding
raise the time and not the work.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax.bench import duel, programs, replay, update, workload
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.plan import machines


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the workloads; tokens and rows."""

  update_rows: int = 8
  update_length: int = 2048
  micro_rows: int = 4
  prefill_rows: int = 8
  prefill_length: int = 2048
  decode_rows: int = 64
  decode_length: int = 1024
  trajectories: int = 64


def qwen3b() -> decoder.DecoderConfig:
  """Shape of Qwen2.5-3B, bfloat16."""
  return decoder.DecoderConfig(
    family="qwen2", vocab_size=151_936, hidden_size=2048,
    intermediate_size=11_008, num_layers=36, num_heads=16, num_kv_heads=2,
    head_dim=128, rope_theta=1e6, qkv_bias=True, dtype=jnp.bfloat16,
  )


def trunk_weights(config: decoder.DecoderConfig) -> int:
  """Weights that every token is multiplied with, the vocabulary's aside."""
  shapes = jax.eval_shape(
    functools.partial(heads.init_trunk, config), jax.random.key(0)
  )
  return sum(x.size for x in jax.tree.leaves(shapes["layers"]))


def forward_flops(
  config: decoder.DecoderConfig, rows: int, length: int, projected: int
) -> float:
  """Model FLOPs of a causal forward pass.

  Args:
    config: shape.
    rows, length: of the batch; a token meets half its row in attention.
    projected: tokens whose logits are computed.
  """
  attention = (
    4 * config.num_layers * config.num_heads * config.head_dim * length / 2
  )
  dense = 2 * trunk_weights(config) + attention
  head = 2 * config.vocab_size * config.hidden_size
  return rows * length * dense + projected * head


def decode_bytes(
  config: decoder.DecoderConfig, rows: int, length: int
) -> float:
  """Bytes that a decode step has to read: weights, keys and values."""
  weights = trunk_weights(config) + config.vocab_size * config.hidden_size
  cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim
  width = jnp.dtype(config.dtype).itemsize
  return width * (weights + rows * length * cache)


def _update(config, params, sizes: Sizes):
  """(a function that updates once, FLOPs of an update)."""
  batch = update.full_rows(
    sizes.update_rows, sizes.update_length, config.vocab_size
  )
  ours = update.Ours(
    config, params, batch, "grpo", sizes.micro_rows, sizes.update_length
  )
  zeros = np.zeros(batch.tokens.shape, np.float32)
  experience = ours.experience(zeros - 10.0, zeros + 1.0)
  flops = 3 * forward_flops(
    config, sizes.update_rows, sizes.update_length,
    int(batch.policy_mask.sum()),
  )
  return lambda: ours.update(experience), flops


def _prefill(config, params, sizes: Sizes):
  """(a function that ingests once, FLOPs of it)."""
  rows, length = sizes.prefill_rows, sizes.prefill_length
  sampler = programs.endless(config, rows, length)
  params = sampler.decode_params(params)
  chunk = programs.prompts(np.ones((rows, length), np.int32), 1, 1.0)
  return (
    lambda: sampler.extend(params, sampler.init_state(), chunk, length),
    forward_flops(config, rows, length, 0),
  )


def _decode(config, params, sizes: Sizes):
  """(a function that decodes a block, bytes that its steps must read)."""
  rows, length = sizes.decode_rows, sizes.decode_length
  steps = programs.BLOCK
  sampler = programs.endless(config, rows, length)
  params = sampler.decode_params(params)

  def block():
    return sampler.decode_block(
      params, programs.speaking(sampler, length - steps), jax.random.key(0),
      length, steps, rows + 1,
    )

  return block, steps * decode_bytes(config, rows, length - steps // 2)


def _seconds(call) -> float:
  began = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - began


def largest_ops(call, count: int = 10) -> list[tuple[str, float]]:
  """The device operations of a call that take longest: (name, share)."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(call())
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
  spent = Counter()
  for plane in profile.planes:
    if not plane.name.startswith("/device:"):
      continue
    for line in plane.lines:
      if line.name == "XLA Ops" or line.name.startswith("Stream"):
        for event in line.events:
          spent[event.name] += event.duration_ns
  whole = sum(spent.values()) or 1
  return [(name, ns / whole) for name, ns in spent.most_common(count)]


@dataclasses.dataclass
class Share(duel.Reading):
  """A reading that also names the largest operations of its call."""

  call: Callable = lambda: None

  def measure(self, repeats: int, before: dict | None = None) -> Iterator[dict]:
    """See `duel.Reading.measure`."""
    for result in super().measure(repeats, before):
      yield result | {"largest_ops": largest_ops(self.call)}


def readings(
  path: str | None, config: decoder.DecoderConfig | None = None,
  sizes: Sizes | None = None,
) -> Iterator[duel.Reading]:
  """Update, prefill, decode, a replay and peak memory on one accelerator.

  Args:
    path: recorded workloads (JSON); None makes similar ones up.
    config: shape; None is Qwen2.5-3B's.
    sizes: of the workloads; None suits 80 GB.

  Raises:
    UserError: the device's peaks are not known.
  """
  config, sizes = config or qwen3b(), sizes or Sizes()
  device = jax.devices()[0]
  machine = machines.of_device(device.platform, device.device_kind)
  # In the type of compute: beside the optimiser there is no room for more.
  params = jax.jit(lambda key: jax.tree.map(
    lambda x: x.astype(config.dtype), heads.init_policy(config, key)
  ))(jax.random.key(0))
  name = f"{trunk_weights(config) / 1e9:.2g} B layers, {machine.name}"
  for what, make, peak, work, goal in (
    ("update, share of peak compute", _update, machine.flops,
     f"{sizes.update_rows} x {sizes.update_length}", "0.45"),
    ("prefill, share of peak compute", _prefill, machine.flops,
     f"{sizes.prefill_rows} x {sizes.prefill_length}", "0.5"),
    ("decode, share of peak bandwidth", _decode, machine.bandwidth,
     f"{sizes.decode_rows} rows at {sizes.decode_length}", "0.6"),
  ):
    call, amount = make(config, params, sizes)
    yield Share(
      what, f"{work}, {name}",
      lambda c=call, a=amount, p=peak: a / p / _seconds(c), goal=goal,
      warm_up=True, call=call,
    )
    del call
  replays = workload.load(path, sizes.trajectories)
  engine = replay.Ours(config, params, replays, sizes.decode_rows)
  tokens = sum(r.total for r in replays)
  yield duel.Reading(
    "replay, tokens a second", f"{workload.describe(replays)}, {name}",
    lambda: tokens / _seconds(engine.play), warm_up=True,
  )
  if device.memory_stats():
    yield duel.Reading(
      "peak memory of all of these", name,
      lambda: device.memory_stats()["peak_bytes_in_use"] / machines.GB,
      unit="GB",
    )
