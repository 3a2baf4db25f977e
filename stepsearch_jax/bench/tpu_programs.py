"""What the TPU compiler makes of an update and of decoding, ours and Tunix's.

  JAX_PLATFORMS=cpu stepsearch bench --suite=tpu_programs --json=programs.json

compiles for `Work.topology` on a machine without a TPU (package libtpu; Tunix's
36 layers, one by one, take a third of an hour on two cores, so `--input=FOLDER`
keeps what was compiled) and compares, per chip: the peak of memory, FLOPs,
bytes that operations move and bytes that collectives send. Nothing runs; the
figures are the compiler's and `hlo_costs`'.

Both sides train Qwen2.5-3B's policy by PPO with an entropy bonus, weights and
moments in float32 and products in bfloat16, every layer computed again, on the
same mesh and micro-batches. An update of ours is `zero`, `accumulate` for each
micro-batch and `apply`; Tunix's is its train step for each micro-batch, with
the moments inside. Memory counts what the policy's training keeps, also where
a program does not touch it, and no other model. Decoding is one token in each
row, its loop's start and end included.

The loop over chunks of policy tokens runs as often as their number asks; it is
taken as spread evenly over the chips.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from stepsearch_jax import files
from stepsearch_jax.bench import duel, hlo_costs, tunix_programs
from stepsearch_jax.plan import arithmetic, machines, tpu_compiler
from stepsearch_jax.ppo import logprobs


@dataclasses.dataclass(frozen=True)
class Work:
  """What both sides are compiled for.

  Attributes:
    topology: name of the slice, see tools/plan.
    layers: of the policy; 0 = all that Qwen2.5-3B has.
    rows, length: trajectories of an update, and their tokens.
    micro_rows: of a micro-batch.
    policy_share: share of the tokens that the policy wrote.
    prompt: first tokens of a row, which Tunix keeps apart.
    slots: rows that decode side by side, over a context of `length`.
    folder: where compiled programs are kept; "" = nowhere.
  """

  topology: str = "v5e:4x4"
  layers: int = 0
  rows: int = 32
  length: int = 2048
  micro_rows: int = 16
  policy_share: float = 0.13
  prompt: int = 256
  slots: int = 128
  folder: str = ""

  def __str__(self) -> str:
    """Returns what the update is of, in words."""
    layers = f"{self.layers} layers, " if self.layers else ""
    return (f"{layers}{self.rows} rows of {self.length:,} in micro-batches of "
            f"{self.micro_rows}, {self.policy_share:.0%} the policy's")


_ROPE_THETA = 1e6  # Qwen2.5's; a config that names no model has another.
# `--input=tiny`: two layers on eight chips.
TINY = Work("v5e:2x4", 2, 16, 1024, 8, 0.13, 256, 16)


@dataclasses.dataclass(frozen=True)
class Figures:
  """Of one chip.

  Attributes:
    tokens: that the work is about: trained, or sampled.
    peak: bytes of memory.
    costs: of the work.
  """

  tokens: int
  peak: float
  costs: hlo_costs.Costs


@dataclasses.dataclass(frozen=True)
class Kept:
  """What is read of a compiled program.

  Attributes:
    text: its optimized HLO.
    arguments, outputs, aliased, temporary: bytes of memory.
    flops, moved: the compiler's own count, loops once.
  """

  text: str
  arguments: int
  outputs: int
  aliased: int
  temporary: int
  flops: float
  moved: float

  @classmethod
  def of(cls, done: Any) -> Kept:
    """Reads a `jax.stages.Compiled`."""
    memory, counted = done.memory_analysis(), done.cost_analysis()
    return cls(
      done.as_text(), memory.argument_size_in_bytes,
      memory.output_size_in_bytes, memory.alias_size_in_bytes,
      memory.temp_size_in_bytes, counted.get("flops", 0.0),
      counted.get("bytes accessed", 0.0),
    )

  @property
  def peak(self) -> int:
    """Bytes of memory; what is written in place counts once."""
    return self.arguments + self.temporary + self.outputs - self.aliased


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
  """Programs of another machine are of no use to the next start here."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)


def _compile(lowered: Any, folder: str, topology: str = "") -> Kept:
  """Compiles a program, or takes it from the folder.

  It is the same one if the lowered text, the topology, JAX and libtpu are.
  """
  if not folder:
    with _uncached():
      return Kept.of(lowered.compile())
  versions = [importlib.metadata.version(x) for x in ("jaxlib", "libtpu")]
  told = os.environ.get("LIBTPU_INIT_ARGS", "")
  source = "\n".join([*versions, topology, told, lowered.as_text()])
  name = hashlib.sha256(source.encode()).hexdigest()[:16]
  path = epath.Path(folder) / f"{name}.json"
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = _compile(lowered, "")
    files.write_text(path, json.dumps(dataclasses.asdict(kept)))
  return Kept(**json.loads(path.read_text()))


def _compiled(
  name: str, lowered: Any, work: Work, unknown_trips: int | None = None
) -> tuple[int, hlo_costs.Costs]:
  """(peak bytes, costs of one run) of a program."""
  logging.info("compiling %s", name)
  kept = _compile(lowered, work.folder, work.topology)
  counted = hlo_costs.Costs(kept.flops, kept.moved)
  costs = hlo_costs.Program(kept.text).costs(unknown_trips, counted)
  logging.info("%s: peak %.4g, %s", name, kept.peak, costs)
  return kept.peak, costs


def _config(work: Work):
  """(settings of a run, the machine)."""
  # Where commands look for configs by name, here or beside the package.
  from configs import stepsearch_qwen2_5_3b

  machine = machines.parse_topology(work.topology)
  config = stepsearch_qwen2_5_3b.get_config()
  config.model.reference = ""  # Its shape, not the files of a model.
  if work.layers:
    config.model.size.layers = work.layers
  config.ppo.mini_batch = config.batch.questions = work.rows
  config.ppo.micro_rows = work.micro_rows
  config.rollout.context = work.length
  config.rollout.max_prompt = config.rollout.max_turn = work.length // 2
  config.rollout.max_observation = work.length // 4
  config.rollout.slots = work.slots
  arithmetic.resolve_mesh(config, machine.chips)
  return config, machine


@functools.cache
def _built(work: Work):
  tunix_programs.installed()  # Else ours would be compiled for nothing.
  config, machine = _config(work)
  devices = tpu_compiler.topology_devices(machine)
  return config, arithmetic.build(config, machine, devices), devices


def _chunks(work: Work, config) -> int:
  """Chunks of policy tokens in a micro-batch's rows on a chip."""
  shards = config.mesh.data * config.mesh.fsdp
  tokens = work.micro_rows // shards * work.length * work.policy_share
  size = logprobs.chunk_size(config.model.size.vocab)
  return int(np.ceil(tokens / size))


@functools.cache
def our_update(work: Work) -> Figures:
  """Compiles our policy update."""
  config, built, _ = _built(work)
  learner = built.training
  lowered = learner.lowered()
  kept = arithmetic.resident(config)
  zero = learner.policy.zero.lower(learner.policy.abstract().params)
  # Neither reads the moments, which stay all the same.
  moments = kept["policy optimizer"]
  first, zeroing = _compiled("our zero", zero, work)
  middle, adding = _compiled(
    "our update", lowered["policy_update"], work, _chunks(work, config)
  )
  last, applying = _compiled("our apply", lowered["policy_apply"], work)
  micros = work.rows // work.micro_rows
  return Figures(
    work.rows * work.length, max(first + moments, middle + moments, last),
    zeroing + adding.times(micros) + applying,
  )


@functools.cache
def our_decode(work: Work) -> Figures:
  """Compiles a block of our decoding; one step of it is counted."""
  _, built, _ = _built(work)
  policy = built.training.abstract_state().policy.params
  lowered = built.rollout.lowered(*built.chunk, policy)["decode_block"]
  return Figures(work.slots, *_compiled("our decoding", lowered, work, 1))


@functools.cache
def _peer(work: Work):
  """(what Tunix works on, its mesh)."""
  config, _, devices = _built(work)
  ppo, mesh = config.ppo, config.mesh
  model = dataclasses.replace(
    arithmetic.model_shape(config), rope_theta=_ROPE_THETA
  )
  step = tunix_programs.Step(
    model=model, rows=work.micro_rows,
    length=work.length, prompt=work.prompt,
    micros=work.rows // work.micro_rows, slots=work.slots, context=work.length,
    learning_rate=ppo.policy_lr, weight_decay=ppo.weight_decay,
    grad_clip=ppo.grad_clip, entropy=ppo.entropy_coef,
  )
  return step, tunix_programs.make_mesh(
    mesh.data * mesh.fsdp, mesh.tensor, devices
  )


@functools.cache
def tunix_update(work: Work) -> Figures:
  """Compiles Tunix's PPO step of the policy."""
  step, mesh = _peer(work)
  lowered = tunix_programs.update(step, mesh)
  peak, costs = _compiled("Tunix's update", lowered, work)
  tokens = step.micros * step.rows * step.length
  return Figures(tokens, peak, costs.times(step.micros))


@functools.cache
def tunix_decode(work: Work) -> Figures:
  """Compiles Tunix's decoding; one step of it is counted."""
  step, mesh = _peer(work)
  lowered = tunix_programs.decode(step, mesh)
  return Figures(step.slots, *_compiled("Tunix's decoding", lowered, work, 1))


# Figure: how it is read, in how much of what it counts, for an update and for
# decoding.
_READ: dict[str, tuple[Callable, tuple[float, str], tuple[float, str]]] = {
  "peak memory": (lambda f: f.peak, (1e9, "GB"), (1e9, "GB")),
  "FLOPs": (lambda f: f.costs.flops, (1e12, "TFLOP"), (1e9, "GFLOP")),
  "bytes moved": (lambda f: f.costs.moved, (1e9, "GB"), (1e9, "GB")),
  "bytes sent": (lambda f: f.costs.sent, (1e9, "GB"), (1e6, "MB")),
}


def _same(ours: int, theirs: int) -> None:
  if ours != theirs:
    raise ValueError(f"ours is about {ours} tokens, Tunix's about {theirs}")


def _measured(
  compiled: Callable[[], Figures], read: Callable, scale: float
) -> Callable[[], duel.Measured]:
  def measure():
    figures = compiled()
    return duel.Measured(figures.tokens, read(figures) / scale)

  return measure


def duels(source: str | None) -> Iterator[duel.Duel]:
  """Yields the comparisons, an update's first.

  Args:
    source: a folder that keeps what was compiled; "tiny" rehearses on two
      layers and eight chips.
  """
  work = TINY if source == "tiny" else Work(folder=source or "")
  sides = {
    "update": (our_update, tunix_update, str(work), "Tunix PPO step"),
    "decode": (
      our_decode, tunix_decode,
      f"a token in each of {work.slots} rows over {work.length:,}",
      "Tunix sampler",
    ),
  }
  for name, (ours, theirs, words, peer) in sides.items():
    for figure, (read, *units) in _READ.items():
      scale, unit = units[name == "decode"]
      yield duel.Duel(
        what=f"{name} on {work.topology}, {figure} per chip", work=words,
        peer=peer, unit=unit, goal="above 1", warm_up=False,
        ours=_measured(functools.partial(ours, work), read, scale),
        theirs=_measured(functools.partial(theirs, work), read, scale),
        same=_same,
      )
