"""Adapters against plain matrix products, and trained in a real update."""

import pathlib

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_test
from etils import epath

from stepsearch_jax import train
from stepsearch_jax.models import adapters, decoder, heads
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import trainable
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings

MODEL = fakes.make_model(50)
SPEC = adapters.AdapterSpec(rank=3, alpha=6.0)


def trained_adapters():
  """Adapters whose B is no longer zero."""
  tree = adapters.init(MODEL, SPEC, jax.random.key(1))
  return jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), tree
  )


def test_merge_adds_scaled_products_to_every_layer_matrix():
  trunk = heads.init_policy(MODEL, jax.random.key(0))["trunk"]
  pairs = trained_adapters()
  merged = adapters.merge(trunk, pairs, SPEC, jnp.float32)
  assert merged["embedding"] is trunk["embedding"]
  for name, (module, inputs) in adapters._TARGETS.items():
    before = np.asarray(trunk["layers"][module][name])
    after = np.asarray(merged["layers"][module][name])
    for layer in range(MODEL.num_layers):
      shape = before[layer].shape
      rows = int(np.prod(shape[:inputs]))
      a = np.asarray(pairs[name]["a"][layer]).reshape(rows, 3)
      b = np.asarray(pairs[name]["b"][layer]).reshape(3, -1)
      want = before[layer].reshape(rows, -1) + 6.0 / 3 * a @ b
      np.testing.assert_allclose(
        after[layer].reshape(rows, -1), want, atol=1e-5, err_msg=name
      )


def test_fresh_adapters_change_nothing_and_untouched_tensors_stay():
  policy = heads.init_policy(MODEL, jax.random.key(0))
  part = trainable.Trainable("policy", MODEL, SPEC)
  params = part.init(policy, jax.random.key(3))
  whole = part.whole(params, policy)
  jax.tree.map(np.testing.assert_array_equal, whole, policy)
  value = trainable.Trainable("value", MODEL, SPEC)
  parts = value.init(policy, jax.random.key(3))
  assert set(parts) == {"adapters", "value_head"}
  tokens = jnp.arange(8, dtype=jnp.int32)[None]
  hidden, _ = decoder.Decoder(MODEL).apply(
    {"params": value.whole(parts, policy)["trunk"]}, tokens, tokens
  )
  assert heads.values(value.whole(parts, policy), hidden).shape == (1, 8)


def test_axes_follow_the_matrices():
  part = trainable.Trainable("value", MODEL, SPEC)
  axes, shapes = part.axes(), part.shapes()
  sharding.tree_shardings(sharding.make_mesh(), axes, shapes)  # Same tree.
  assert axes["adapters"]["o_kernel"] == {
    "a": ("layers", "heads", "head_dim", "rank"),
    "b": ("layers", "rank", "embed"),
  }


def test_bad_sizes_are_refused():
  with pytest.raises(ValueError, match="rank >= 1"):
    adapters.AdapterSpec(rank=0)


@pytest.mark.slow
def test_a_run_with_adapters_trains_saves_little_and_reloads(tmp_path):
  config = train_test.tiny()
  config.policy.kind, config.value.kind = "lora", "adapter"
  config.policy.rank = config.value.rank = 4
  workdir = epath.Path(tmp_path)
  with jax.numpy_dtype_promotion("standard"):
    summary = train.train(config, workdir)
    experiment = Experiment(Settings.from_config(config), workdir)
    step, policy = experiment.trained_policy()
  assert summary["steps"] == step == 2
  first = train_test.records(workdir)[1]
  assert abs(first["critic/kl"]) < 1e-6  # The run starts at its reference.
  frozen = heads.init_policy(experiment.model, jax.random.key(0))
  assert jax.tree.map(jnp.shape, policy) == jax.tree.map(jnp.shape, frozen)
  saved = pathlib.Path(workdir) / "checkpoints/2/policy"
  size = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file())
  assert size < 0.5 * 4 * sum(x.size for x in jax.tree.leaves(policy))
