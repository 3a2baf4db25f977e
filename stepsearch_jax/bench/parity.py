"""This device's numbers beside the CPU's: attention, scores, update, rollout.

Each case computes named arrays from seeds alone. A process of its own computes
them on the CPU in float32; here they are computed on the default device, in
float32 (products in full precision) and in bfloat16, and the relative error
|a - b| / |b| of each case is a figure. NaN never passes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.bench import duel, programs, replay, update, workload
from stepsearch_jax.models import attention, decoder, heads
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import learner

Arrays = dict[str, np.ndarray]

_LIMITS = {"float32": 1e-3, "bfloat16": 3e-2}
_STEPS, _PROMPT = 32, 96


def small(dtype: jax.typing.DTypeLike) -> decoder.DecoderConfig:
  """A decoder that every backend's kernels accept."""
  return decoder.DecoderConfig(
    family="qwen2", vocab_size=2048, hidden_size=256, intermediate_size=512,
    num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, qkv_bias=True,
    dtype=dtype,
  )


def _policy(config: decoder.DecoderConfig):
  """Parameters drawn on the host, so that every device starts from the same."""
  shapes = jax.eval_shape(
    functools.partial(heads.init_policy, config), jax.random.key(0)
  )
  rng = np.random.default_rng(3)

  def draw(x):
    if x.shape[-1:] == (config.hidden_size,) and len(x.shape) <= 2:
      return np.ones(x.shape, np.float32)  # A norm's scale.
    return 0.06 * rng.standard_normal(x.shape).astype(np.float32)

  params = jax.tree.map(draw, shapes)
  params["trunk"]["embedding"] = 0.06 * rng.standard_normal(
    (config.vocab_size, config.hidden_size)
  ).astype(np.float32)
  return params


def _attention(
  dtype, backend, length: int, dim: int, prefix: float = 0.0
) -> Arrays:
  """Packed attention and its gradients over two segments and padding.

  Args:
    dtype: of the computation.
    backend: of the attention.
    length: of the rows.
    dim: of a head.
    prefix: share of the row that both segments of the first row see.
  """
  rng = np.random.default_rng(1)
  rows, queries, keys = 2, 8, 2
  q, k, v = (
    jnp.asarray(rng.standard_normal((rows, length, n, dim)), dtype)
    for n in (queries, keys, keys)
  )
  weight = rng.standard_normal(q.shape).astype(np.float32)
  steps = np.arange(length)[None]
  ends = length * np.array([[0.5, 0.9], [0.25, 0.75]])
  segments = np.where(steps < ends[:, :1], 1, 2)
  segments = np.where(steps < ends[:, 1:], segments, 0).astype(np.int32)
  segments[0, : int(prefix * length)] = attention.PREFIX
  # What padding attends to is nobody's business.
  weight *= (segments != 0)[..., None, None]

  def scalar(*inputs):
    out = attention.packed_attention(*inputs, segments, backend)
    return (out.astype(jnp.float32) * weight).sum(), out

  grads, out = jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)
  shown = np.asarray(out, np.float32) * (segments != 0)[..., None, None]
  named = zip("qkv", grads, strict=True)
  return {"out": shown} | {
    f"grad {name}": np.asarray(x, np.float32) for name, x in named
  }


def _replays() -> list[workload.Replay]:
  turns = ((30, 60), (20, 40), (9, 0))
  return [workload.Replay(40 + 7 * i, turns[i % 2 :]) for i in range(4)]


def _trained(dtype, estimator: str):
  """(learner, state, batch) of the small model."""
  config = small(dtype)
  batch = update.batch_of(_replays(), config.vocab_size)
  spec = update.learner_spec(estimator, len(batch.tokens), 2, 384, 1e-3)
  trainer = learner.Learner(config, config, spec, sharding.make_mesh())
  params = _policy(config)
  reference = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
  state = trainer.start(params, reference, jax.random.key(1))
  return trainer, state, batch


def _scores(dtype) -> Arrays:
  """Log-probabilities and values of a batch in packed rows."""
  trainer, state, batch = _trained(dtype, "gae")
  found, _ = trainer.prepare(state, batch)
  return {"logp": found.logp, "reference": found.reference_logp,
          "values": found.values}


def _update(dtype) -> Arrays:
  """Losses, gradient norms and the step of one PPO update."""
  trainer, state, batch = _trained(dtype, "gae")
  before = jax.device_get(state.policy.params)
  found, _ = trainer.prepare(state, batch)
  state, metrics = trainer.update(state, found)
  after = jax.device_get(state.policy.params)
  moments = [
    leaf for leaf in jax.tree.leaves(jax.device_get(state.policy.opt))
    if leaf.ndim
  ]
  return {
    "gradient norms": np.array([
      metrics["actor/grad_norm"], metrics["critic/grad_norm"]
    ]),
    # Adam's first step is nearly the sign of the gradient, which rounding
    # turns where the gradient is tiny: its moments are compared instead.
    "moments": np.concatenate([np.ravel(x) for x in moments]),
    "size of the step": np.array([float(np.sqrt(sum(
      np.square(a - b).sum() for a, b in zip(
        jax.tree.leaves(after), jax.tree.leaves(before), strict=True
      )
    )))]),
  }


def _rollout(dtype, temperature: float) -> Arrays:
  """Tokens and log-probabilities of a prefill and a block of decode steps."""
  config = small(dtype)
  rows = 4
  compiled = programs.endless(config, rows, 256)
  params = compiled.decode_params(_policy(config))
  given = np.random.default_rng(5).integers(1, config.vocab_size,
                                            (rows, _PROMPT))
  chunk = programs.prompts(given.astype(np.int32), _STEPS, temperature)
  state = compiled.extend(params, compiled.init_state(), chunk, _PROMPT)
  _, output = compiled.decode_block(
    params, state, jax.random.key(7), _PROMPT + _STEPS, _STEPS, rows + 1
  )
  output = jax.device_get(output)
  return {"tokens": output.tokens[:, :_STEPS],
          "logprobs": output.logprobs[:, :_STEPS]}


def _engine(dtype) -> Arrays:
  """Counts of a whole multi-turn rollout through the engine."""
  config = small(dtype)
  engine = replay.Ours(config, _policy(config), _replays(), 2)
  return {"counts": np.array(engine.play())}


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison: what is computed, by what and in which kinds of number."""

  name: str
  compute: Callable[..., Arrays]
  backends: tuple[str, ...] = ()
  dtypes: tuple[str, ...] = ("float32", "bfloat16")


CASES = (
  Case("update", _update),
  Case("rollout, greedy", functools.partial(_rollout, temperature=0.0)),
  # A random policy is so flat that in bfloat16 other tokens are drawn.
  Case("rollout, sampled", functools.partial(_rollout, temperature=1.0),
       dtypes=("float32",)),
  Case("scores", _scores),
  Case("attention 256, 64 wide",
       functools.partial(_attention, length=256, dim=64), ("xla", "cudnn")),
  Case("attention 384, 128 wide",
       functools.partial(_attention, length=384, dim=128), ("xla", "cudnn")),
  Case("attention 255 (odd)",
       functools.partial(_attention, length=255, dim=64), ("xla", "cudnn")),
  Case("attention 512, shared prefix",
       functools.partial(_attention, length=512, dim=64, prefix=0.3),
       ("xla", "cudnn")),
  Case("engine", _engine),
)


def _reference(case: Case) -> Arrays:
  return case.compute(jnp.float32, *case.backends[:1])


def error(found: Arrays, wanted: Arrays) -> float:
  """The largest relative error of some arrays.

  Of rollouts ("tokens"), log-probabilities count up to a row's first other
  token; a single other choice under rounding is no error, but a row that
  leaves before its fourth token is.

  Raises:
    UserError: shapes differ, a number is not finite, or a rollout goes
      another way at once.
  """
  found = dict(found)
  wanted = dict(wanted)
  if "tokens" in wanted:
    apart = found.pop("tokens") != wanted.pop("tokens")
    same = ~np.logical_or.accumulate(apart, axis=1)
    if same.sum(axis=1).min() < 4:
      raise types.UserError(
        f"rows agree in their first {same.sum(axis=1).tolist()} tokens"
      )
    found["logprobs"] = found["logprobs"] * same
    wanted["logprobs"] = wanted["logprobs"] * same
  worst = 0.0
  for name, there in wanted.items():
    here = np.asarray(found[name], np.float64)
    if here.shape != there.shape:
      raise types.UserError(f"{name}: {here.shape} here, {there.shape} there")
    if not np.isfinite(here).all():
      raise types.UserError(
        f"{name}: {(~np.isfinite(here)).sum()} of {here.size} numbers are not "
        "finite"
      )
    scale = np.linalg.norm(there) or 1.0
    worst = max(worst, float(np.linalg.norm(here - there) / scale))
  return worst


def save(name: str, path: str) -> None:
  """Writes a case's arrays on this process's device, in float32."""
  (case,) = (case for case in CASES if case.name == name)
  np.savez(path, allow_pickle=False, **_reference(case))


class _OfCpu:
  """A case's arrays from a process that sees the CPU alone.

  It runs while the device computes the same.
  """

  def __init__(self, case: str):
    self._case = case
    self._process: subprocess.Popen | None = None
    self._found: dict[str, np.ndarray] | None = None

  def start(self) -> None:
    """Starts the process, once."""
    if self._process is not None:
      return
    self._folder = tempfile.TemporaryDirectory()
    self._path = pathlib.Path(self._folder.name) / "cpu.npz"
    self._process = subprocess.Popen(
      [sys.executable, "-m", __name__, self._case, str(self._path)],
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )

  def arrays(self) -> Arrays:
    """What it computed.

    Raises:
      UserError: the process failed.
    """
    if self._found is None:
      _, problems = self._process.communicate()
      if self._process.returncode:
        raise types.UserError(
          f"the CPU's numbers could not be computed: {problems[-800:]}"
        )
      with np.load(self._path) as arrays:
        self._found = dict(arrays)
    return self._found


def _measured(
  case: Case, dtype: str, backend: str | None, wanted: _OfCpu
) -> float:
  """The error of a case; raises when it is past its limit."""
  wanted.start()
  extra = (backend,) if case.backends else ()
  # By default float32 products lose half their digits on an accelerator.
  precision = "float32" if dtype == "float32" else None
  with jax.default_matmul_precision(precision):
    found = case.compute(jnp.dtype(dtype).type, *extra)
  apart = error(found, wanted.arrays())
  if apart > _LIMITS[dtype]:
    raise types.UserError(
      f"relative error {apart:.2g}, at most {_LIMITS[dtype]} expected"
    )
  return apart


def readings(path: str | None) -> Iterator[duel.Reading]:
  """The relative error of every case on the default device.

  Args:
    path: unused; the cases are small everywhere.
  """
  del path
  device = jax.local_devices()[0].device_kind
  for case in CASES:
    wanted = _OfCpu(case.name)
    for backend in case.backends or (None,):
      for dtype in case.dtypes:
        if backend == "cudnn" and dtype == "float32":
          continue  # It goes through XLA by design.
        work = f"{dtype}, {device}" + (f", {backend}" if backend else "")
        yield duel.Reading(
          f"parity, {case.name}", work,
          functools.partial(_measured, case, dtype, backend, wanted),
          goal=f"at most {_LIMITS[dtype]:g}", once=True,
        )


if __name__ == "__main__":
  save(*sys.argv[1:])
