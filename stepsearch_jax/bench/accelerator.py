"""The shares of an accelerator's peaks that each phase of training reaches.

Model FLOPs are counted, not the hardware's: rematerialization and padding
raise the time and not the work. Every figure builds what it needs when it is
taken, so that one alone (`--what=decode`) costs nothing of the others.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.bench import (
  duel,
  profile,
  programs,
  replay,
  update,
  workload,
)
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.plan import machines


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the workloads; tokens and rows.

  Attributes:
    update_layers: of the model that is trained; 0 = as many as fit.
    rollout_layers: of the model that decodes and prefills; 0 = all.
    replay_shapes: of the replay's programs; few, since compiling them for an
      accelerator takes longer than the replay.
  """

  update_rows: int = 8
  update_length: int = 2048
  micro_rows: int = 4
  prefill_rows: int = 8
  prefill_length: int = 2048
  decode_rows: int = 64
  decode_length: int = 1024
  trajectories: int = 64
  update_layers: int = 0
  rollout_layers: int = 0
  replay_shapes: replay.Shapes = replay.Shapes((8,), (192, 576), (1152,))


@dataclasses.dataclass(frozen=True)
class Work:
  """A call to be timed, and the FLOPs or bytes that it cannot do without."""

  call: Callable[[], Any]
  amount: float


def qwen3b() -> decoder.DecoderConfig:
  """Shape of Qwen2.5-3B, bfloat16."""
  return decoder.DecoderConfig(
    family="qwen2", vocab_size=151_936, hidden_size=2048,
    intermediate_size=11_008, num_layers=36, num_heads=16, num_kv_heads=2,
    head_dim=128, rope_theta=1e6, qkv_bias=True, dtype=jnp.bfloat16,
  )


def tiny() -> tuple[decoder.DecoderConfig, Sizes]:
  """A shape and sizes that rehearse the suite on any machine."""
  config = dataclasses.replace(
    qwen3b(), vocab_size=512, hidden_size=64, intermediate_size=128,
    num_layers=2, num_heads=4, head_dim=16,
  )
  shapes = replay.Shapes((2,), (192, 576), (768,))
  return config, Sizes(2, 128, 1, 2, 64, 2, 128, 2, 0, 0, shapes)


def trunk_weights(config: decoder.DecoderConfig) -> int:
  """Weights that every token is multiplied with, the vocabulary's aside."""
  shapes = jax.eval_shape(
    functools.partial(heads.init_trunk, config), jax.random.key(0)
  )
  return sum(x.size for x in jax.tree.leaves(shapes["layers"]))


def forward_flops(
  config: decoder.DecoderConfig, rows: float, length: float, projected: float
) -> float:
  """Model FLOPs of a causal forward pass.

  Args:
    config: shape.
    rows, length: of the batch (means will do); a token meets half its row in
      attention.
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


def fitting_layers(config: decoder.DecoderConfig, memory: float) -> int:
  """Layers of a shape whose full training fits a device, in steps of four.

  A weight that is trained takes 24 bytes while gradients accumulate: master,
  two moments, two gradients in float32, and two copies in the type of compute
  (reference and cast). A quarter more and 10 GB are left to activations.

  Args:
    config: shape.
    memory: bytes of the device.
  """
  weights = (memory - 10 * machines.GB) / 30
  weights -= config.vocab_size * config.hidden_size
  layers = int(weights * config.num_layers / trunk_weights(config))
  return min(max(layers - layers % 4, 1), config.num_layers)


def random_policy(config: decoder.DecoderConfig) -> types.Tree:
  """Random parameters in the type of compute.

  Beside the optimizer there is no room for more.
  """
  return jax.jit(lambda key: jax.tree.map(
    lambda x: x.astype(config.dtype), heads.init_policy(config, key)
  ))(jax.random.key(0))


class _Training:
  """A learner on full rows."""

  def __init__(self, config, sizes: Sizes):
    self._config = config
    self._batch = update.full_rows(
      sizes.update_rows, sizes.update_length, config.vocab_size
    )
    self._ours = update.Ours(
      config, random_policy(config), self._batch, "grpo", sizes.micro_rows,
      sizes.update_length,
    )

  def _forward(self) -> float:
    rows, length = self._batch.tokens.shape
    return forward_flops(
      self._config, rows, length,
      int(self._batch.policy_mask.sum()),
    )

  def update(self) -> Work:
    """One optimizer step."""
    zeros = np.zeros(self._batch.tokens.shape, np.float32)
    experience = self._ours.experience(zeros - 10.0, zeros + 1.0)
    return Work(lambda: self._ours.update(experience), 3 * self._forward())

  def scoring(self) -> Work:
    """Log-probabilities under policy and reference."""
    return Work(lambda: self._ours.scores().logp, 2 * self._forward())


def _prefill(config, sizes: Sizes) -> Work:
  """Prompts into all slots at once."""
  rows, length = sizes.prefill_rows, sizes.prefill_length
  compiled = programs.endless(config, rows, length)
  params = compiled.decode_params(random_policy(config))
  chunk = programs.prompts(np.ones((rows, length), np.int32), 1, 1.0)
  return Work(
    lambda: compiled.extend(params, compiled.init_state(), chunk, length),
    forward_flops(config, rows, length, 0),
  )


def _decode(config, sizes: Sizes) -> Work:
  """A block of decode steps in full slots."""
  rows, length = sizes.decode_rows, sizes.decode_length
  steps = programs.BLOCK
  compiled = programs.endless(config, rows, length)
  params = compiled.decode_params(random_policy(config))

  def block():
    return compiled.decode_block(
      params, programs.speaking(compiled, length - steps), jax.random.key(0),
      length, steps, rows + 1,
    )

  return Work(block, steps * decode_bytes(config, rows, length - steps // 2))


def _seconds(call) -> float:
  began = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - began


@dataclasses.dataclass
class Share(duel.Reading):
  """The share of a peak that some work reaches, with its seconds and profile.

  Attributes:
    make: builds the work.
    peak: FLOPs or bytes a second.
  """

  make: Callable[[], Work] = None
  peak: float = 1.0

  def measure(self, repeats: int, before: dict | None = None) -> Iterator[dict]:
    """See `duel.Reading.measure`."""
    if before and len(before["repeats"]) >= repeats:
      return
    work, seconds = self.make(), []

    def read():
      seconds.append(_seconds(work.call))
      return work.amount / self.peak / seconds[-1]

    self.read = read
    for result in super().measure(repeats, before):
      result |= {
        "seconds": statistics.median(seconds[self.warm_up:]),
        "first_seconds": seconds[0],
      }
      yield result  # Kept should the profiler fail.
      yield result | profile.of_call(work.call)
    self.read = None


def _replay(replays, config, sizes: Sizes) -> Work:
  """Whole rollouts of given lengths; the amount is their tokens."""
  engine = replay.Ours(
    config, random_policy(config), replays, sizes.decode_rows,
    shapes=sizes.replay_shapes,
  )
  engine.compile_ahead()
  return Work(engine.play, sum(r.total for r in replays))


def _memory(what: str, work: str) -> Iterator[duel.Reading]:
  """The most memory that this process held so far, where devices tell."""
  device = jax.local_devices()[0]
  if device.memory_stats():
    yield duel.Reading(
      f"{what}, peak memory of the process so far", work,
      lambda: device.memory_stats()["peak_bytes_in_use"] / machines.GB,
      unit="GB",
    )


@dataclasses.dataclass(frozen=True)
class _Phase:
  """A phase whose share of a peak is taken.

  Attributes:
    make: builds its work.
    work: what the figure names beside the machine.
  """

  name: str
  make: Callable[[], Work]
  work: str
  goal: str
  by_bytes: bool = False


def _phases(config, trained, sizes: Sizes) -> Iterator[_Phase]:
  """The phases as training runs them."""
  training = functools.cache(lambda: _Training(trained, sizes))
  rows = f"{sizes.update_rows} x {sizes.update_length}"
  part = f"{rows}, {trained.num_layers} of {config.num_layers} layers"
  if trained.remat != decoder.Remat.FULL:
    part += f", remat {trained.remat}"
  yield _Phase(
    "training: update", lambda: training().update(), part, "0.45"
  )
  yield _Phase(
    "training: scoring", lambda: training().scoring(), part, "0.5"
  )
  training.cache_clear()  # The optimizer would take the cache's room.
  whole = f"{trunk_weights(config) / 1e9:.2g} B layers"
  yield _Phase(
    "decode", lambda: _decode(config, sizes),
    f"{sizes.decode_rows} rows at {sizes.decode_length}, {whole}", "0.6", True,
  )
  yield _Phase(
    "prefill", lambda: _prefill(config, sizes),
    f"{sizes.prefill_rows} x {sizes.prefill_length}, {whole}", "0.5",
  )


def _updated(config, sizes: Sizes):
  return _Training(config, sizes).update()


def _by_attention(config) -> Iterator[tuple[str, decoder.DecoderConfig]]:
  """(name, shape) with the device's own attention and with XLA's."""
  for backend in (None, "xla"):
    yield (
      backend or "as it is", dataclasses.replace(config, attention=backend)
    )


def _variants(config, trained, sizes: Sizes) -> Iterator[_Phase]:
  """The same phases in few layers, by what may be chosen."""
  layers = f"{config.num_layers} layers"
  rows = f"{sizes.decode_rows} rows at {sizes.decode_length}, {layers}"
  for backend, shape in _by_attention(config):
    yield _Phase(
      "decode", functools.partial(_decode, shape, sizes),
      f"{rows}, attention {backend}", "0.6", True,
    )
  rows = f"{sizes.update_rows} x {sizes.update_length}"
  for remat in (decoder.Remat.DOTS, decoder.Remat.NONE, decoder.Remat.FULL):
    shape = dataclasses.replace(trained, remat=remat)
    yield _Phase(
      "training: update", functools.partial(_updated, shape, sizes),
      f"{rows}, {trained.num_layers} layers, remat {remat}", "0.45",
    )
  rows = f"{sizes.prefill_rows} x {sizes.prefill_length}, {layers}"
  for backend, shape in _by_attention(config):
    yield _Phase(
      "prefill", functools.partial(_prefill, shape, sizes),
      f"{rows}, attention {backend}", "0.5",
    )


def readings(
  path: str | None, config: decoder.DecoderConfig | None = None,
  sizes: Sizes | None = None,
) -> Iterator[duel.Reading]:
  """Update, scoring, decode, prefill and a replay on one accelerator.

  Args:
    path: recorded workloads (JSON); None makes similar ones up. Or words:
      "tiny" also takes `tiny` sizes, "variants" the phases in few layers by
      attention and remat, "dots" and "none" train with that remat.
    config: shape; None is Qwen2.5-3B's.
    sizes: of the workloads; None suits 80 GB and more.

  Raises:
    UserError: the device's peaks are not known.
  """
  words = set((path or "").split()) & {"tiny", "variants", *decoder.Remat}
  if "tiny" in words:
    config, sizes = tiny()
  config, sizes = config or qwen3b(), sizes or Sizes()
  if "variants" in words:
    few = {"update_layers": 12, "rollout_layers": 8}  # Compiled in seconds.
    fewer: dict[str, Any] = {
      name: min(count, config.num_layers) for name, count in few.items()
    }
    sizes = dataclasses.replace(sizes, **fewer)
  device = jax.local_devices()[0]
  machine = machines.of_device(device.platform, device.device_kind)
  memory = (device.memory_stats() or {}).get("bytes_limit", machine.memory)
  layers = sizes.update_layers or fitting_layers(config, memory)
  (remat,) = [r for r in decoder.Remat if r in words] or [config.remat]
  trained = dataclasses.replace(config, num_layers=layers, remat=remat)
  depth = sizes.rollout_layers or config.num_layers
  config = dataclasses.replace(config, num_layers=depth)
  phases = _variants if "variants" in words else _phases
  for phase in phases(config, trained, sizes):
    work = f"{phase.work}, {machine.name}"
    peak = machine.bandwidth if phase.by_bytes else machine.flops
    kind = "bandwidth" if phase.by_bytes else "compute"
    yield Share(
      f"{phase.name}, share of peak {kind}", work, None, goal=phase.goal,
      warm_up=True, make=phase.make, peak=peak,
    )
    yield from _memory(phase.name, work)
  if "variants" in words:
    return
  replays = workload.load(None if words else path, sizes.trajectories)
  work = (f"{workload.describe(replays)}, "
          f"{trunk_weights(config) / 1e9:.2g} B layers, {machine.name}")
  yield Share(
    "replay, tokens a second", work, None, warm_up=True,
    make=lambda: _replay(replays, config, sizes),
  )
  yield from _memory("replay", work)
