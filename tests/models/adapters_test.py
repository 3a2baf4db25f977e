"""Adapters against plain matrix products, and trained in a real update."""

import functools
import pathlib

import fakes
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_test
from etils import epath

from stepsearch_jax import train
from stepsearch_jax.models import adapters, decoder, heads, layers
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import trainable
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings

MODEL = fakes.make_model(50)
SPEC = adapters.AdapterSpec(rank=3, alpha=6.0)


def trained_adapters():
  """Adapters whose B is no longer zero."""
  return fakes.disturbed(adapters.init(MODEL, SPEC, jax.random.key(1)))


def test_merge_adds_scaled_products_to_every_layer_matrix():
  trunk = fakes.make_policy(MODEL)["trunk"]
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


def merged_by_hand(trunk, pairs):
  """The trunk with W + alpha / rank * A B in float64, matrix by matrix."""
  layers = {k: dict(v) for k, v in jax.device_get(trunk["layers"]).items()}
  for name, (module, _) in adapters._TARGETS.items():
    before = np.asarray(layers[module][name], np.float64)
    a = np.asarray(pairs[name]["a"], np.float64)
    b = np.asarray(pairs[name]["b"], np.float64)
    a, b = a.reshape(len(a), -1, 3), b.reshape(len(b), 3, -1)
    layers[module][name] = before + 2.0 * (a @ b).reshape(before.shape)
  layers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), layers)
  return {**trunk, "layers": layers}


@functools.partial(jax.jit, static_argnums=0)
def logits(config, variables, policy):
  tokens = (jnp.arange(24, dtype=jnp.int32)[None] * 7) % config.vocab_size
  hidden, _ = decoder.Decoder(config).apply(
    variables, tokens, jnp.arange(24, dtype=jnp.int32)[None]
  )
  return heads.logits(policy, hidden)


def test_the_forward_pass_adds_what_merging_would():
  policy = fakes.make_policy(MODEL)
  pairs = trained_adapters()
  model = trainable.Trainable("policy", MODEL, SPEC).apart(
    {"adapters": pairs}, policy
  )
  assert model["trunk"] is policy["trunk"]  # Nothing is copied or merged.
  by_hand = merged_by_hand(policy["trunk"], pairs)
  np.testing.assert_allclose(
    logits(MODEL, heads.variables(model), policy),
    logits(MODEL, {"params": by_hand}, policy), atol=2e-5,
  )


def test_gradients_of_adapters_are_those_through_the_merged_matrices():
  policy = fakes.make_policy(MODEL)
  pairs = trained_adapters()

  def loss(pairs, form):
    if form == "apart":
      found = {"params": policy["trunk"],
               "adapters": adapters.collection(pairs, SPEC)}
    else:
      found = {"params": adapters.merge(policy["trunk"], pairs, SPEC)}
    return jnp.square(logits(MODEL, found, policy)).mean()

  apart, merged = (
    jax.jit(functools.partial(jax.grad(loss), form=form))(pairs)
    for form in ("apart", "merged")
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-3),
    apart, merged,
  )


def test_updates_far_below_bfloat16s_rounding_still_count():
  # |B| near 1e-5: in a bfloat16 matrix nothing of A B is left.
  wide = fakes.make_model(
    50, hidden_size=128, intermediate_size=256, num_heads=4, head_dim=32
  )
  spec = adapters.AdapterSpec(rank=8, alpha=8.0)
  policy = fakes.make_policy(wide)
  pairs = adapters.init(wide, spec, jax.random.key(1))
  a, b = (pairs["up_kernel"][side][0] for side in "ab")
  b = 1e-5 * jax.random.normal(jax.random.key(2), b.shape)
  kernel = policy["trunk"]["layers"]["mlp"]["up_kernel"][0]
  kernel = kernel.astype(jnp.bfloat16)
  x = jax.random.normal(jax.random.key(9), (1, 4096, 128), jnp.bfloat16)
  true = x.astype(jnp.float32) @ a @ b
  merged = (kernel.astype(jnp.float32) + a @ b).astype(jnp.bfloat16)

  def effect(with_update):
    return (with_update - x @ kernel).astype(jnp.float32)

  class Holder(nn.Module):
    @nn.compact
    def __call__(self, x):
      return layers.multiply(
        self, "up_kernel", x, kernel, "bsm,mf->bsf", jnp.bfloat16
      )

  apart = Holder().apply({"adapters": {"up_kernel": {"a": a, "b": b}}}, x)

  def slope(found):
    """1 where the effect has on average the size that it should have."""
    return float((effect(found) * true).sum() / (true * true).sum())

  assert abs(slope(x @ merged)) < 0.2
  assert slope(apart) == pytest.approx(1.0, abs=0.1)


def test_fresh_adapters_change_nothing_and_untouched_tensors_stay():
  policy = fakes.make_policy(MODEL)
  variant = trainable.Trainable("policy", MODEL, SPEC)
  params = variant.init(policy, jax.random.key(3))
  whole = variant.merged(params, policy, jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, whole, policy)
  apart = variant.apart(params, policy)
  np.testing.assert_allclose(
    logits(MODEL, heads.variables(apart), apart),
    logits(MODEL, heads.variables(policy), policy), atol=5e-6,
  )
  value = trainable.Trainable("value", MODEL, SPEC)
  parts = value.init(policy, jax.random.key(3))
  assert set(parts) == {"adapters", "value_head"}
  tokens = jnp.arange(8, dtype=jnp.int32)[None]
  model = value.apart(parts, policy)
  values = jax.eval_shape(
    lambda model: heads.values(model, decoder.Decoder(MODEL).apply(
      heads.variables(model), tokens, tokens
    )[0]), model,
  )
  assert values.shape == (1, 8)


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
  frozen = fakes.make_policy(experiment.model)
  assert jax.tree.map(jnp.shape, policy) == jax.tree.map(jnp.shape, frozen)
  saved = pathlib.Path(workdir) / "checkpoints/2/policy"
  size = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file())
  assert size < 0.5 * 4 * sum(x.size for x in jax.tree.leaves(policy))
