"""One rollout and one update on a mesh of virtual devices, for mesh_test.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python tests/mesh_worker.py OUTPUT.npz DATA FSDP TENSOR
"""

import sys

import fakes
import jax
import numpy as np
import optax
from ppo import parts

from stepsearch_jax import types
from stepsearch_jax.env import actions
from stepsearch_jax.models import heads
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import batching, learner
from stepsearch_jax.rollout import records

CONTEXT = 192


def probes(name, played):
  """Probe values of all trajectories, 1 where nothing was asked."""
  rows = [
    np.nan_to_num(np.concatenate([p.logp.ravel(), p.others.ravel()]), nan=1.0)
    for p in (t.probe for t in played.trajectories)
  ]
  return {f"{name}/probe": np.concatenate(rows)}


def main(output, data, fsdp, tensor):
  jax.config.update("jax_default_matmul_precision", "highest")
  # Whatever the random policy writes is a search, so that many happen.
  actions.parse = lambda text: actions.ParsedTurn(
    types.Action.SEARCH, text
  )
  mesh = sharding.make_mesh(int(data), int(fsdp), int(tensor))
  tokenizer = fakes.make_tokenizer()
  # Two kv heads and an odd vocabulary: neither divides a tensor axis of 4.
  model = fakes.make_model(tokenizer.vocab_size + 1, hidden_size=64)
  policy = fakes.make_policy(model)
  spec = parts.learner_spec(
    batch__mini_batch=16, batch__micro_rows=8, batch__row_length=CONTEXT,
    adam__learning_rate=2e-4, kl__coef=0.001,
  )
  ours = learner.Learner(model, model, spec, mesh)
  state = ours.init_state(policy, heads.value_from_policy(
    policy, jax.random.key(1)
  ), policy)
  limits = fakes.engine_spec(
    extend_rows=(8,), probe=records.ProbeSpec(2, (24,), others=1, seed=0)
  )
  found = {}
  for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
    player = fakes.make_engine(
      tokenizer, model, fakes.FakeRetriever(), slots=8, context=CONTEXT,
      mesh=mesh, spec=limits,
    )
    played = player.run(
      state.policy.params, fakes.make_questions(16), range(16), temperature,
      probe=True,
    )
    found |= probes(f"{name}/warm", played)
    player.probe(state.reference, played)
    found |= probes(f"{name}/read", played)
    player.close()
    played = played.trajectories
    found[f"{name}/tokens"] = np.concatenate([t.tokens for t in played])
    found[f"{name}/searches"] = sum(
      turn.retrieved for t in played for turn in t.turns
    )
  rng = np.random.default_rng(0)
  rewards = [
    np.where(t.policy_mask, rng.normal(size=len(t.tokens)), 0) for t in played
  ]
  batch = batching.trajectories_to_batch(
    played, rewards, CONTEXT, tokenizer.pad_id
  )
  experience, seen = ours.prepare(state, batch)
  state, updated = ours.update(state, experience)
  found |= {
    f"metric/{name}": value for name, value in {**seen, **updated}.items()
    if not name.startswith("timing_s/")
  }
  for kind in ("policy", "value"):
    trained = getattr(state, kind)
    leaves = jax.tree_util.tree_leaves_with_path(trained.params)
    moments = optax.tree_utils.tree_get(trained.opt, "mu")
    moments = jax.tree_util.tree_leaves(moments)
    for (path, leaf), moment in zip(leaves, moments, strict=True):
      found[f"{kind}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
      # After one step the first moment is a tenth of the clipped gradient.
      gradient = 10 * np.asarray(moment)
      found[f"gradient/{kind}{jax.tree_util.keystr(path)}"] = gradient
      whole = leaf.sharding.is_fully_replicated
      found[f"replicated/{kind}{jax.tree_util.keystr(path)}"] = whole
  np.savez(output, **found)


if __name__ == "__main__":
  main(*sys.argv[1:])
