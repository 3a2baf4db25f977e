"""Token choice against distributions worked out by hand."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax.rollout import sampling

ROOT = pathlib.Path(__file__).parents[2]


def test_draws_follow_the_softmax_distribution():
  logits = jnp.log(jnp.array([0.1, 0.0, 0.6, 0.3] + [0.0] * 300))
  uniform = (jnp.arange(1000, dtype=jnp.float32) + 0.5) / 1000
  drawn, norm = sampling.sample_tokens(jnp.tile(logits, (1000, 1)), uniform)
  np.testing.assert_allclose(norm, 0.0, atol=1e-6)
  counts = np.bincount(np.asarray(drawn), minlength=4)
  np.testing.assert_allclose(counts[:4], [100, 0, 600, 300], atol=1)
  edge, _ = sampling.sample_tokens(
    jnp.tile(logits, (2, 1)), jnp.array([0.0, 1.0 - 2**-24])
  )
  assert set(np.asarray(edge).tolist()) == {0, 3}


def test_top_k_and_top_p_keep_the_hand_worked_sets():
  logits = jnp.log(jnp.array([[0.5, 0.05, 0.3, 0.15]]))
  kept = lambda k, p: np.isfinite(  # noqa: E731
    np.asarray(sampling.filter_logits(logits, k, p))
  )[0].tolist()
  assert kept(0, 1.0) == [True] * 4
  assert kept(2, 1.0) == [True, False, True, False]
  assert kept(0, 0.5) == [True, False, False, False]
  assert kept(0, 0.6) == [True, False, True, False]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens_the_distribution(temperature):
  """p ** (1 / temperature), normalized; its log is what is recorded."""
  p = np.array([0.5, 0.3, 0.2])
  want = p ** (1 / temperature)
  want /= want.sum()
  uniform = (jnp.arange(1000, dtype=jnp.float32) + 0.5) / 1000
  drawn, logprobs = sampling.select(
    jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (1000, 1)),
    jnp.full(1000, temperature), uniform, 0, 1.0,
  )
  drawn = np.asarray(drawn)
  np.testing.assert_allclose(
    np.bincount(drawn, minlength=3) / 1000, want, atol=2e-3
  )
  np.testing.assert_allclose(logprobs, np.log(want)[drawn], atol=1e-5)


def test_filters_shape_the_draw_and_not_the_recorded_log_probability():
  logits = jnp.log(jnp.tile(jnp.array([0.2, 0.5, 0.3]), (100, 1)))
  uniform = (jnp.arange(100, dtype=jnp.float32) + 0.5) / 100
  for top_k, top_p in ((1, 1.0), (0, 0.4)):
    drawn, logprobs = sampling.select(
      logits, jnp.ones(100), uniform, top_k, top_p
    )
    assert set(np.asarray(drawn).tolist()) == {1}
    np.testing.assert_allclose(logprobs, np.log(0.5), atol=1e-6)


def test_uniforms_depend_on_key_episode_and_position_each():
  def draw(seed, episode, position):
    return sampling.uniforms(
      jax.random.key(seed), jnp.array([episode]), jnp.array([position])
    ).item()

  assert draw(0, 1, 2) == draw(0, 1, 2)
  # Episode and position do not stand in for each other either.
  others = [draw(1, 1, 2), draw(0, 2, 2), draw(0, 1, 3), draw(0, 2, 1)]
  assert len({draw(0, 1, 2), *others}) == 5
  both = sampling.uniforms(
    jax.random.key(0), jnp.array([2, 1]), jnp.array([1, 2])
  )
  assert both[1].item() == draw(0, 1, 2)  # Whatever its row.


SPLIT = """
import re
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from stepsearch_jax.parallel import sharding
from stepsearch_jax.rollout import sampling

VOCAB = 2 * 64 * 37  # Two shares of an odd number of blocks.


def select(logits, uniform):
  logits = nn.with_logical_constraint(logits, ("slots", "vocab"))
  return sampling.select(logits, jnp.ones(len(logits)), uniform, 0, 1.0)


rng = np.random.default_rng(0)
logits = 3 * rng.standard_normal((64, VOCAB)).astype(np.float32)
uniform = rng.random(64).astype(np.float32)
with sharding.scope(sharding.make_mesh(1, 2, 2)):
  compiled = jax.jit(select).lower(logits, uniform).compile()
  tokens, logp = compiled(logits, uniform)
text = compiled.as_text()
sent = re.findall(
  r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)\\(", text
)
sizes = [
  np.prod([int(n) for n in dims.split(",") if n])
  for shapes in sent for dims in re.findall(r"\\[([\\d,]*)\\]", shapes)
]
print(max(sizes) <= 32 * 74, len(sizes) > 0)
p = np.exp(logits.astype(np.float64))
p /= p.sum(1, keepdims=True)
upto = p.cumsum(1)[np.arange(64), tokens]
own = p[np.arange(64), tokens]
print(bool(((upto - own <= uniform + 1e-6) & (uniform <= upto + 1e-6)).all()))
print(float(np.abs(np.log(own) - logp).max()) < 1e-5)
"""


def test_a_vocabulary_that_devices_share_is_not_gathered():
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
  }
  done = subprocess.run(
    [sys.executable, "-c", SPLIT], env=environment, capture_output=True,
    text=True, timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.split() == ["True"] * 4
