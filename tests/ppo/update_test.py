"""Each loss switch in a real update: packed micro-batches against loops.

The loss is written out row by row and turn by turn over padded rows, in numpy;
what its differences say of each token goes through one plain forward pass, and
the norm of that gradient must be the one that the update reports.
"""

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppo import parts

from stepsearch_jax.models import decoder, heads
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import learner, records

MODEL = decoder.DecoderConfig(
  "qwen2", 40, 8, 12, 1, 1, 1, 8, qkv_bias=True, remat="none"
)
WIDTH = 16
CONSTANT = 20  # Tokens of a packed row, and of Dr.GRPO's fixed length.


@pytest.fixture(autouse=True)
def optax_promotes():
  """Optax raises floats to integer powers, which strict promotion forbids."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@functools.cache
def make_learner(**changes):
  spec = parts.learner_spec(
    batch__row_length=CONSTANT, batch__micro_rows=1, batch__mini_batch=4,
    estimator__name="reinforce", **changes,
  )
  return learner.Learner(MODEL, MODEL, spec, sharding.make_mesh())


@functools.cache
def policy():
  return fakes.make_policy(MODEL)


def make_batch():
  rng = np.random.default_rng(0)
  lengths = np.array([16, 9, 12, 5], np.int32)
  inside = np.arange(WIDTH)[None] < lengths[:, None]
  mask = (rng.random(inside.shape) < 0.6) & inside
  mask[:, :2] = False
  mask[:3, 3] = True
  mask[3] = False  # A row without policy tokens.
  tokens = np.where(inside, rng.integers(0, 40, mask.shape), 0)
  return parts.rollout_batch(
    mask, np.where(mask, rng.normal(size=mask.shape), 0),
    tokens.astype(np.int32), lengths,
  )


@jax.jit
def _forward(params, batch_tokens, temperature):
  steps = jnp.arange(WIDTH, dtype=jnp.int32)
  hidden, _ = decoder.Decoder(MODEL).apply(
    {"params": params["trunk"]}, batch_tokens,
    jnp.broadcast_to(steps, batch_tokens.shape),
  )
  hidden = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  table = jax.nn.log_softmax(heads.logits(params, hidden) / temperature)
  picked = jnp.take_along_axis(table, batch_tokens[..., None], -1)[..., 0]
  return picked, -(jnp.exp(table) * table).sum(-1)


def forward(params, batch, temperature=1.0):
  """(log-probabilities, entropies) [B, T] from all logits at once."""
  return _forward(params, batch.tokens, temperature)


def experience(batch):
  """Log-probabilities that moved since, and advantages of both signs."""
  rng = np.random.default_rng(1)
  logp = np.asarray(forward(policy(), batch)[0])
  shape = logp.shape
  masks = records.Masks.of(batch, "policy")
  rows = np.array([[1.0], [-1.0], [0.5], [1.0]])
  on = batch.policy_mask > 0
  return records.Experience(
    batch=batch, masks=masks,
    logp=np.where(on, logp + 0.4 * rng.normal(size=shape), 0).astype("f4"),
    reference_logp=np.where(on, logp - 0.3, 0).astype("f4"),
    values=np.zeros(shape, "f4"),
    advantages=(on * (rows + 0.3 * rng.normal(size=shape))).astype("f4"),
    returns=np.zeros(shape, "f4"), value_weights=masks.value, kl=0.0,
  )


def written_out(logp, entropy, held, exp, spec):
  """The loss by rows, turns and tokens, in the notation of the papers.

  `held` are the log-probabilities once more, where no gradient flows.
  """
  batch, loss = exp.batch, spec.loss
  rows, counts, llds = [], [], []
  for b, on in enumerate(batch.policy_mask > 0):
    terms, penalty = [], 0.0
    where = np.nonzero(on)[0]
    good = on.any() and exp.advantages[b][on].mean() >= 0
    for n in range(batch.turn[b].max() + 1):
      turn = np.nonzero(batch.turn[b] == n)[0]
      gap, still = logp[b] - exp.logp[b], held[b] - exp.logp[b]
      drop = -gap[turn]
      if good:
        weight = np.where(
          turn >= batch.answer_start[b], loss.llds_answer_weight, 1.0
        )
        fell = weight * np.maximum(drop, 0) if drop.sum() > 0 else np.zeros(1)
        penalty += fell.sum() / len(where)
      of = {"token": None, "sequence": where, "turn": turn}[loss.ratio]
      for t in turn:
        mean = still[t] if of is None else still[of].mean()
        ratio = np.exp(mean - still[t] + gap[t])
        if loss.old_logp == "rollout":  # Larger weights are scaled down.
          ratio *= min(np.exp(mean), loss.importance_cap) / np.exp(mean)
        a = exp.advantages[b, t]
        high = loss.clip_ratio_high or loss.clip_ratio
        kept = np.clip(ratio, 1 - loss.clip_ratio, 1 + high)
        term = -min(ratio * a, kept * a)
        if loss.dual_clip and a < 0:
          term = min(term, loss.dual_clip * -a)
        term -= loss.entropy_coef * entropy[b, t]
        if not spec.kl.in_reward:
          far = exp.reference_logp[b, t] - logp[b, t]
          term += spec.kl.coef * (np.exp(far) - far - 1)
        terms.append(term)
    rows.append(sum(terms, start=0.0))
    counts.append(len(where))
    if good:
      llds.append(penalty)
  filled = [i for i, count in enumerate(counts) if count]
  total = {
    "token": lambda: sum(rows) / sum(counts),
    "sequence": lambda: sum(rows[i] / counts[i] for i in filled) / len(filled),
    "constant": lambda: sum(rows) / (len(rows) * CONSTANT),
  }[loss.aggregation]()
  return total + loss.llds_coef * sum(llds) / max(len(llds), 1)


SWITCHES = {
  "today": {},
  "clip higher": dict(loss__clip_ratio=0.1, loss__clip_ratio_high=0.5),
  "dual clip": dict(loss__dual_clip=1.2),
  "sequence ratio": dict(loss__ratio="sequence", loss__clip_ratio=0.1),
  "turn ratio": dict(loss__ratio="turn", loss__clip_ratio=0.1),
  "mean of rows": dict(loss__aggregation="sequence", kl__in_reward=False),
  "constant": dict(loss__aggregation="constant"),
  "llds": dict(loss__llds_coef=0.5),
  "recorded": dict(loss__old_logp="rollout", loss__importance_cap=1.3),
}


@jax.jit
def pulled(params, tokens, slopes):
  """Gradient of a sum over log-probabilities and entropies, each weighed."""
  def loss(params):
    return sum(map(jnp.vdot, slopes, _forward(params, tokens, 1.0)))

  return jax.grad(loss)(params)


@functools.cache
def gradient(spec):
  """Gradient of the written-out loss at `policy()`."""
  exp, step = experience(make_batch()), 1e-5
  here = [np.float64(x) for x in forward(policy(), exp.batch)]
  slopes, held = [np.zeros_like(x) for x in here], here[0].copy()
  for x, slope in zip(here, slopes, strict=True):
    for place in zip(*np.nonzero(exp.batch.policy_mask), strict=True):
      ends, middle = [], x[place]
      for x[place] in (middle - step, middle + step):
        ends.append(written_out(*here, held, exp, spec))
      x[place] = middle
      slope[place] = (ends[1] - ends[0]) / (2 * step)
  return pulled(
    policy(), exp.batch.tokens, [np.float32(slope) for slope in slopes]
  )


# The others differ from these by less than a path of code.
FAST = ("turn ratio", "llds")


@pytest.mark.parametrize("name", [
  pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
  for name in SWITCHES
])
def test_an_update_follows_the_written_out_loss(name):
  ours, batch = make_learner(**SWITCHES[name]), make_batch()
  exp = experience(batch)
  state = ours.init_state(policy(), None, policy())
  _, metrics = ours.update(state, exp)
  grads = gradient(ours.spec)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-3)
  if name != "today":
    before = gradient(make_learner().spec)
    same = [np.allclose(a, b, rtol=1e-3) for a, b in zip(
      jax.tree.leaves(grads), jax.tree.leaves(before), strict=True)]
    assert not all(same), "the switch does nothing in this test"
