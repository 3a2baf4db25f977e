"""Attention of what each slot holds: interpreted here, compiled for TPUs."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax.models import attention, cache, decode_kernel, decoder
from stepsearch_jax.parallel import sharding
from stepsearch_jax.plan import machines, tpu_compiler
from stepsearch_jax.rollout import programs

ROOT = pathlib.Path(__file__).parents[2]
BLOCK, LENGTH, DIM = 128, 512, 128
# Nothing, one, inside a block, at and beside its boundaries, all.
LENGTHS = (0, 1, 77, 127, 128, 129, 0, 255, 256, 300, 384, 511, 512, 0)


def by_hand(q, k, v, lengths):
  """Attention of [B, KV, G, D] over the first entries, a query at a time."""
  out = np.zeros(q.shape)
  for slot, head, group in np.ndindex(q.shape[:3]):
    seen = slice(lengths[slot])
    scores = k[slot, head, seen] @ q[slot, head, group]
    weights = np.exp(scores - scores.max(initial=-np.inf))
    mixed = weights @ v[slot, head, seen]
    out[slot, head, group] = mixed / max(weights.sum(), 1e-9)
  return out


def drawn(lengths, kv, groups, seed=0):
  """Queries, and a cache whose entries behind a slot's length are NaN."""
  rng = np.random.default_rng(seed)
  slots = len(lengths)
  q = rng.standard_normal((slots, kv, groups, DIM)) / DIM**0.5
  k, v = rng.standard_normal((2, slots, kv, LENGTH, DIM))
  for slot, length in enumerate(lengths):
    k[slot, :, length:] = v[slot, :, length:] = np.nan
  return q, k, v


interpreted = functools.partial(decode_kernel.attend, interpret=True)


@pytest.mark.parametrize(("dtype", "atol"), [
  (jnp.float32, 2e-6), (jnp.bfloat16, 0.02),
])
@pytest.mark.parametrize(("kv", "groups", "cores"), [
  (2, 1, 1), (1, 2, 2), (2, 8, 1),
])
def test_a_slot_sees_its_entries_and_nothing_else(
  dtype, atol, kv, groups, cores
):
  q, k, v = (np.asarray(jnp.asarray(x, dtype), np.float64)
             for x in drawn(LENGTHS, kv, groups))
  found = jax.jit(interpreted, static_argnames=("rows", "cores"))(
    *(jnp.asarray(x, dtype) for x in (q, k, v)),
    jnp.asarray(LENGTHS, jnp.int32), rows=BLOCK, cores=cores,
  )
  assert found.dtype == dtype
  np.testing.assert_allclose(
    np.asarray(found, np.float64), by_hand(q, k, v, LENGTHS), atol=atol
  )


@pytest.mark.parametrize("cores", [1, 2, 4])
@pytest.mark.parametrize("lengths", [
  (0, 1, 128, 129, 512, 0, 300, 0), (0,) * 8, (512,) * 8,
  (0, 0, 0, 0, 200, 512, 1, 0),
])
def test_only_blocks_with_entries_are_listed_each_once_and_in_order(
  lengths, cores
):
  blocks, own = LENGTH // BLOCK, len(lengths) // cores
  listed = decode_kernel.visits(
    jnp.asarray(lengths, jnp.int32), BLOCK, blocks, cores
  )
  slots, places = (
    np.asarray(x).reshape(cores, own * blocks)
    for x in (listed.slot, listed.block)
  )
  for core, steps in enumerate(listed.steps.tolist()):
    mine = range(core * own, (core + 1) * own)
    want = [
      (slot, block) for slot in mine for block in range(blocks)
      if block * BLOCK < lengths[slot]
    ]
    pairs = list(zip(slots[core], places[core], strict=True))
    assert pairs[:steps] == want
    # Steps without work stay where the copies are already.
    assert len(set(pairs[max(steps - 1, 0):])) == 1
    assert pairs[-1][0] in mine and 0 <= pairs[-1][1] < blocks


def test_blocks_past_the_length_are_never_copied(monkeypatch):
  """By the index maps, which alone say what is copied."""
  specs = []
  real = decode_kernel.pl.BlockSpec

  def noted(shape, index):
    specs.append((shape, index))
    return real(shape, index)

  monkeypatch.setattr(decode_kernel.pl, "BlockSpec", noted)
  lengths = np.array([300, 0, 128, 1], np.int32)
  inputs = map(jnp.float32, drawn(lengths, 2, 2))
  jax.eval_shape(
    functools.partial(interpreted, rows=BLOCK), *inputs, jnp.asarray(lengths)
  )
  listed = decode_kernel.visits(jnp.asarray(lengths), BLOCK, 4, 1)
  (shape, index), = (spec for spec in specs if spec[0][2] == BLOCK)
  assert shape == (None, 2, BLOCK, DIM)
  copied = {
    tuple(map(int, index(0, step, listed, lengths))) for step in range(16)
  }
  assert copied == {
    (0, 0, 0, 0), (0, 0, 1, 0), (0, 0, 2, 0), (2, 0, 0, 0), (3, 0, 0, 0)
  }


def shapes(slots=4, heads=4, kv=2, length=LENGTH, dim=DIM, **types):
  entries = (slots, kv, length, dim)
  return [
    jax.ShapeDtypeStruct(shape, types.get(name, jnp.bfloat16))
    for name, shape in (
      ("q", (slots, 1, heads, dim)), ("k", entries), ("v", entries)
    )
  ]


def test_what_the_kernel_cannot_do_is_refused():
  rows = decode_kernel.block_rows
  assert rows(*shapes()) == 512
  assert rows(*shapes(length=256 * 3)) == 256
  assert rows(*shapes(kv=8, heads=8)) == 128  # Of 8 heads as many bytes.
  assert rows(*shapes(kv=32, heads=32)) == 128  # The smallest there is.
  assert rows(*shapes(kv=8, heads=8), 4) == 512  # A device has two of them.
  assert rows(*shapes(length=320)) is None
  assert rows(*shapes(dim=64)) is None
  assert rows(*shapes(q=jnp.float32)) is None
  q, k, v = shapes(length=256)
  more = jax.ShapeDtypeStruct((4, 2, *q.shape[2:]), q.dtype)
  assert rows(more, k, v) is None  # Two queries per slot.
  turned = jax.ShapeDtypeStruct((4, 2, DIM, 256), k.dtype)
  assert rows(q, turned, v) is None
  assert rows(jax.ShapeDtypeStruct((3, *q.shape[1:]), q.dtype), k, v) is None


def cached(q, k, v, positions, backend):
  slots = cache.Cache((), (), order=cache.KeyOrder.TD)
  return attention.cached_attention(
    q, (k, v), positions, slots, 384, backend
  )


@pytest.fixture
def on_any_device(monkeypatch):
  monkeypatch.setattr(decode_kernel, "attend", interpreted)


@pytest.mark.parametrize("heads", [2, 4, 16])
def test_the_tpus_way_equals_xlas(on_any_device, heads):
  rng = np.random.default_rng(3)
  q = jnp.asarray(rng.standard_normal((5, 1, heads, DIM)), jnp.float32)
  k, v = jnp.asarray(
    rng.standard_normal((2, 5, 2, LENGTH, DIM)), jnp.float32
  )
  # The last slot is not active: its position is outside.
  positions = jnp.asarray([[0], [127], [128], [383], [LENGTH]], jnp.int32)
  ours, xla = (
    jax.jit(cached, static_argnames="backend")(
      q, k, v, positions, backend=backend
    ) for backend in ("splash", "xla")
  )
  np.testing.assert_allclose(ours[:4], xla[:4], atol=2e-6)
  np.testing.assert_array_equal(ours[4], 0)


@pytest.mark.slow
def test_a_rollout_is_the_same_token_by_token(monkeypatch):
  """Greedy and sampled, more questions than slots, searches in between."""
  calls = []
  monkeypatch.setattr(decode_kernel, "_KEY_BYTES", 1)  # Blocks of 128.
  monkeypatch.setattr(
    decode_kernel, "attend",
    lambda *inputs, **how: calls.append(how) or interpreted(*inputs, **how),
  )
  tokenizer = fakes.make_tokenizer()
  played = {}
  for backend in ("xla", "splash"):
    model = fakes.make_model(
      tokenizer.vocab_size, head_dim=DIM, attention=backend
    )
    policy = fakes.make_tag_lover(tokenizer, fakes.make_policy(model))
    player = fakes.make_engine(tokenizer, model, fakes.FakeRetriever())
    played[backend] = [
      trajectory for temperature in (0.0, 1.0)
      for trajectory in player.run(
        policy, fakes.make_questions(6), range(6), temperature
      ).trajectories
    ]
    player.close()
    assert bool(calls) == (backend == "splash")
  assert sum(len(t.turns) for t in played["xla"]) > 12
  for ours, theirs in zip(played["splash"], played["xla"], strict=True):
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


# On a mesh of 2 x 2 x 2, two slots and two heads to a device.
SPLIT = """
import functools, jax, jax.numpy as jnp, numpy as np
from stepsearch_jax.models import attention, cache, decode_kernel
from stepsearch_jax.parallel import sharding

jax.config.update("jax_default_matmul_precision", "highest")
calls, real = [], decode_kernel.attend

def attend(q, k, v, lengths, **how):
  calls.append((q.shape, k.shape, lengths.shape))
  return real(q, k, v, lengths, interpret=True, **how)

decode_kernel.attend = attend
rng = np.random.default_rng(0)
q = rng.standard_normal((8, 1, 8, 128)).astype(np.float32)
entries = rng.standard_normal((2, 8, KV, 256, 128)).astype(np.float32)
where = np.array([3, 130, 256, 0, 255, 127, 128, 200], np.int32)[:, None]
slots = cache.Cache((), ())
mesh = sharding.make_mesh(2, 2, 2)
axes = ("batch", "length", "heads", "head_dim")
placed = [sharding.put(x, sharding.named(mesh, names, x.shape)) for x, names
          in zip((q, *entries), (axes, *slots.axes))]
found = {}
for backend in ("splash", "xla"):
  with sharding.scope(mesh):
    found[backend] = np.asarray(jax.jit(
      lambda q, k, v: attention.cached_attention(
        q, (k, v), where, slots, None, backend
      )
    )(*placed))
live = where[:, 0] < 256
np.testing.assert_allclose(found["splash"][live], found["xla"][live],
                           atol=2e-6)
print(calls)
"""


@pytest.mark.parametrize(("kv", "calls"), [
  (4, "[((2, 2, 2, 128), (2, 2, 256, 128), (2,))]"),
  (1, "[]"),  # One kv head for two devices: through XLA.
])
def test_devices_attend_to_their_own_slots_and_heads(kv, calls):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
  }
  done = subprocess.run(
    [sys.executable, "-c", SPLIT.replace("KV", str(kv))], env=environment,
    capture_output=True, text=True, timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.strip() == calls


def described(topology, *mesh):
  """Chips that exist only for the compiler."""
  pytest.importorskip("libtpu")
  machine = machines.parse_topology(topology)
  devices = tpu_compiler.topology_devices(machine)
  return sharding.make_mesh(*mesh, devices=devices[: np.prod(mesh)])


@pytest.mark.parametrize(("topology", "cores"), [("v5e:2x2", 1),
                                                 ("v5p:2x2x1", 2)])
@pytest.mark.parametrize("kv, groups", [(1, 8), (2, 1), (4, 7), (32, 1)])
def test_the_tpu_compiler_takes_it(topology, cores, kv, groups):
  mesh = described(topology, 1, 1, 1)
  q, k, v = shapes(heads=kv * groups, kv=kv, length=2048)
  with (
    sharding.scope(mesh), jax.numpy_dtype_promotion("standard"),
    jax.default_matmul_precision("default"),
  ):
    assert sharding.cores() == cores
    done = jax.jit(cached, static_argnums=4).lower(
      *sharding.abstract((q, k, v), sharding.replicated(mesh)),
      sharding.abstract(
        jax.ShapeDtypeStruct((4, 1), jnp.int32), sharding.replicated(mesh)
      ), "splash",
    ).compile()
  assert done.as_text().count('custom_call_target="tpu_custom_call"') == 1
  # Neither keys nor values are copied to lie another way.
  assert done.memory_analysis().temp_size_in_bytes < k.size


@pytest.mark.slow
def test_a_decode_step_hands_the_kernel_the_cache_as_it_lies():
  mesh = described("v5e:2x4", 1, 4, 2)
  model = decoder.DecoderConfig(
    family="qwen2", vocab_size=4096, hidden_size=256, intermediate_size=512,
    num_layers=3, num_heads=4, num_kv_heads=2, head_dim=DIM, qkv_bias=True,
    dtype=jnp.bfloat16, attention="splash",
  )
  spec = programs.ProgramSpec(
    slots=16, context=2048, block=16, top_k=0, top_p=1.0
  )
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.default_matmul_precision("default"),
  ):
    rollout = programs.RolloutPrograms(
      model, spec, np.zeros((8, 4096), np.int32), 7, mesh
    )
    lowered, short = map(rollout._lower_decode, (2048, 512))
    # Whatever bound a program has, it reads what slots hold: one will do.
    assert lowered.as_text() == short.as_text()
    assert set(map(rollout._reach, rollout.kv_buckets)) == {2048}
    text = lowered.compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  # A chip's entries are written in place, and never copied or turned.
  made = set(re.findall(r"= bf16\[4,(?:1,)?2048,128\]\S* ([\w-]+)\(", text))
  assert made <= {
    "bitcast", "get-tuple-element", "parameter", "fusion", "scatter"
  }
  assert "scatter" in made
