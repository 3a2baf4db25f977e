"""Which rematerialization fits: by hand, and beside what autodiff keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart, stepsearch_qwen2_5_3b
from stepsearch_jax.models import decoder
from stepsearch_jax.plan import (
  arithmetic,
  machines,
  remat,
  report,
  tpu_compiler,
)
from stepsearch_jax.plan.machines import GB
from stepsearch_jax.ppo import forward, trainable
from stepsearch_jax.ppo.records import MicroBatch

LAYERS, ROWS, LENGTH = 5, 2, 256
# Bytes per token, layer and chip of 3B in bfloat16, heads and MLP in halves.
INPUT = 2 * 2048
RESULTS = INPUT + 2 * (8 * 128 + 2 * 1 * 128 + 2048 + 2 * 5504)
ALL = (
  2 * (4 + 2 + 2) * 2048  # Norms.
  + 2 * (3 * 8 * 128 + 2 * 1 * 128) + 4 * 8  # The kernel of attention.
  + 2 * 6 * 5504
)
KEPT = {"full": INPUT, "dots": RESULTS, "none": ALL}
TOKENS = 36 * 2 * 4096  # Of all layers, on a chip: two rows of sixteen.


def more_than_full(word, weights):
  """Bytes per chip; those who keep everything keep bfloat16 weights too."""
  more = TOKENS * (KEPT[word] - INPUT)
  return more + (weights if word == "none" else 0)


def planned(topology, **changes):
  config = stepsearch_qwen2_5_3b.get_config()
  config.update_from_flattened_dict(changes)
  machine = machines.parse_topology(topology)
  arithmetic.resolve_mesh(config, machine.chips)
  return config, machine


def kept_by_autodiff(model):
  """Bytes per token that the scan over layers stacks, per layer."""
  micro = MicroBatch.abstract((ROWS, LENGTH), None)
  shapes = trainable.Trainable("value", model).shapes()
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.default_matmul_precision("default"),
  ):
    traced = jax.make_jaxpr(jax.grad(
      lambda params, micro: forward.values(params, micro, model).sum()
    ))(shapes, micro)
  scan = next(e for e in traced.jaxpr.eqns if e.primitive.name == "scan")
  stacked = [
    out.aval for out in scan.outvars if out.aval.shape[:2] == (LAYERS, ROWS)
  ]
  size = sum(aval.size * aval.dtype.itemsize for aval in stacked)
  return size / (LAYERS * ROWS * LENGTH)


@pytest.mark.parametrize("platform, dtype, word", [
  ("tpu", jnp.bfloat16, "full"),
  ("tpu", jnp.bfloat16, "dots"),
  ("tpu", jnp.bfloat16, "none"),
  ("cpu", jnp.bfloat16, "none"),
  ("cpu", jnp.float32, "none"),
])
def test_a_layer_keeps_what_autodiff_keeps(platform, dtype, word):
  backend = {"tpu": "splash", "cpu": "xla"}[platform]
  model = decoder.DecoderConfig(
    family="qwen2", vocab_size=64, hidden_size=128, intermediate_size=320,
    num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=64, qkv_bias=True,
    dtype=dtype, remat=word, attention=backend,
  )
  found = arithmetic.layer_bytes(model, platform, LENGTH, 1)[word]
  # Statistics of norms and softmax are not counted: a few numbers a token.
  np.testing.assert_allclose(found, kept_by_autodiff(model), rtol=0.02)


def test_no_kernel_of_attention_means_scores():
  model = decoder.DecoderConfig(
    family="qwen2", vocab_size=64, hidden_size=128, intermediate_size=320,
    num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64, dtype=jnp.bfloat16,
  )
  def kept(platform, length, dtype=jnp.bfloat16):
    other = decoder.dataclasses.replace(model, dtype=dtype)
    return arithmetic.layer_bytes(other, platform, length, 1)["none"]

  assert kept("tpu", 4096) == kept("tpu", 256) == kept("gpu", 200)
  # Rows that no kernel takes; float32, which cuDNN does not.
  assert kept("tpu", 4097) > kept("tpu", 4096) + 4 * 2048 * 6
  assert kept("gpu", 4096, jnp.float32) == kept("cpu", 4096, jnp.float32)
  assert kept("tpu", 4096, jnp.float32) < kept("cpu", 4096, jnp.float32)


def test_updates_need_what_their_layers_keep():
  config, machine = planned("v5e:4x4")
  found = {
    word: remat.choose(config, machine, word, {}) for word in KEPT
  }
  weights = arithmetic.resident(config)["reference"]
  for word, choice in found.items():
    np.testing.assert_allclose(
      choice.update - found["full"].update, more_than_full(word, weights)
    )
    assert not choice.compiled
  # 8.5 and 30.3 GB more than 11.3.
  assert [found[word].fits for word in KEPT] == [True, False, False]
  assert config.model.remat == "full"


@pytest.mark.parametrize("topology, fastest", [
  ("v5e:4x4", "full"),  # 16 GB
  ("v6e:4x4", "dots"),  # 32 GB
  ("v5p:2x2x4", "none"),  # 95 GB
])
@pytest.mark.parametrize("word", list(KEPT))
def test_the_fastest_that_fits_is_said(topology, fastest, word):
  made = report.make_plan(
    *planned(topology, **{"model.remat": word}), {}, 2048, 0.15
  )
  assert made["remat_fastest"] == fastest
  assert made["fits"] == made["remat"][word]["fits"]
  assert made["peak"] == made["remat"][word]["peak"]
  seconds = {name: c["seconds"] for name, c in made["remat"].items()}
  assert seconds["none"] < seconds["dots"] < seconds["full"]
  assert seconds[word] == made["phases"]["updates"]["seconds"]
  text = report.render(made)
  assert f"model.remat = {fastest} is the fastest that fits" in text
  saved = f": {seconds[word] - seconds[fastest]:.2f} s less for the updates"
  assert (saved in text) == (made["fits"] and word != fastest)


def test_where_nothing_fits_no_remat_is_recommended():
  config, machine = planned("gpu-h100x1", **{"mesh.tensor": 1})
  made = report.make_plan(config, machine, {}, 2048, 0.15)
  assert made["remat_fastest"] is None
  assert "no model.remat fits" in report.render(made)


def memory(size):
  return {"arguments": 0, "outputs": 0, "aliased": 0, "temporary": size}


def test_what_the_compiler_says_of_one_remat_corrects_the_others():
  config, machine = planned("v5e:4x4")
  programs = {
    "extend": memory(0), "policy_update": memory(int(2 * GB)),
    "value_update": memory(int(3 * GB)),
  }
  full, dots, none = (
    remat.choose(config, machine, word, programs) for word in KEPT
  )
  parts = arithmetic.resident(config)
  kept = sum(
    size for name, size in parts.items()
    if name not in ("decode weights", "slot cache")
  )
  assert full.update == kept + 3 * GB + parts["value"]
  # Weights and slots of the rollout are more than that.
  assert full.peak == sum(parts.values())
  np.testing.assert_allclose(
    [dots.update - full.update, none.update - full.update],
    [more_than_full(word, parts["reference"]) for word in ("dots", "none")],
  )
  assert (full.compiled, dots.compiled) == (True, False)
  updates = {name: memory(int(4 * GB)) for name in programs if "_up" in name}
  dots = remat.choose(config, machine, "dots", programs, updates)
  np.testing.assert_allclose(dots.update, full.update + GB)
  assert dots.compiled and dots.fits


class Lowered:
  """A program that the compiler refuses, or of a size."""

  def __init__(self, size=None, refusal="RESOURCE_EXHAUSTED: E1000"):
    self._size, self._refusal = size, refusal

  def compile(self):
    if self._size is None:
      raise jax.errors.JaxRuntimeError(self._refusal)
    return self

  def memory_analysis(self):
    names = ("argument", "output", "alias", "temp")
    return type("Memory", (), {
      f"{name}_size_in_bytes": self._size * (name == "temp") for name in names
    })


def test_a_program_that_the_compiler_refuses_does_not_fit():
  config, machine = planned("v5e:4x4")
  programs = tpu_compiler.compiled_memory(
    {"extend": Lowered(5), "policy_update": Lowered()}, machine
  )
  assert programs["extend"] == memory(5)
  programs["value_update"] = memory(0)
  assert not report.make_plan(config, machine, programs, 2048, 0.15)["fits"]
  broken = {"extend": Lowered(refusal="INTERNAL: a bug")}
  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    tpu_compiler.compiled_memory(broken, machine)


@pytest.mark.parametrize("word, sizes, compiled, fastest", [
  # 40 GB of 95: there is nothing to look for behind it.
  ("full", {"none": 30}, ["none"], "none"),
  ("full", {"none": None, "dots": 9}, ["none", "dots"], "dots"),
  ("full", {"none": 99, "dots": 99}, ["none", "dots"], "full"),
  ("dots", {"none": 99}, ["none"], "dots"),
  ("none", {}, [], "none"),
])
def test_what_is_faster_is_compiled_until_it_fits(
  monkeypatch, word, sizes, compiled, fastest
):
  config, machine = planned("v5p:2x2x4", **{"model.remat": word})

  class Learner:
    def __init__(self, word):
      size = sizes[word] and int(sizes[word] * GB)
      self.lowered = lambda: {
        "policy_update": Lowered(size), "value_update": Lowered(size),
        "policy_apply": Lowered(refusal="not asked for"),
      }

  monkeypatch.setattr(tpu_compiler, "topology_devices", lambda machine: [])
  monkeypatch.setattr(arithmetic, "build", lambda config, *rest: (
    arithmetic.Built(Learner(config.model.remat), None, None)
  ))
  programs = {name: memory(int(5 * GB)) for name in (
    "extend", "policy_update", "value_update"
  )}
  updates = tpu_compiler.compile_faster(config, machine, programs)
  assert list(updates) == compiled
  made = report.make_plan(config, machine, programs, 2048, 0.15, updates)
  assert made["remat_fastest"] == fastest
  assert [k for k, c in made["remat"].items() if c["compiled"]] == [
    name for name in ("full", "dots", "none") if name in (*compiled, word)
  ]


def test_what_cannot_fit_is_not_compiled(monkeypatch):
  # By the estimate dots wants 19 and none 40 GB of 16.
  config, machine = planned("v5e:4x4")
  words = []
  monkeypatch.setattr(tpu_compiler, "topology_devices", lambda machine: [])
  monkeypatch.setattr(arithmetic, "build", lambda config, *rest: (
    words.append(config.model.remat) or arithmetic.Built(
      type("Learner", (), {"lowered": staticmethod(dict)}), None, None
    )
  ))
  programs = {name: memory(int(4 * GB)) for name in (
    "extend", "policy_update", "value_update"
  )}
  updates = tpu_compiler.compile_faster(config, machine, programs)
  assert words == ["dots"] == list(updates)


@pytest.mark.slow
def test_the_compiler_needs_what_is_estimated():
  pytest.importorskip("libtpu")
  config = quickstart.get_config()
  machine = machines.parse_topology("v5e:2x2")
  config.model.dtype = "bfloat16"
  # Many layers, so that what they keep is most of it.
  config.model.size.update(dict(hidden=256, mlp=1024, layers=32))
  config.rollout.context = 256
  config.ppo.micro_rows = 64
  config.ppo.mini_batch = config.batch.questions = 128
  arithmetic.resolve_mesh(config, machine.chips)
  devices = tpu_compiler.topology_devices(machine)
  resident = sum(arithmetic.resident(config)[name] for name in (
    "policy", "policy optimizer", "value", "value optimizer", "reference"
  ))
  ratios = {}
  for word in KEPT:
    other = remat.with_remat(config, word)
    with (
      jax.numpy_dtype_promotion("standard"),
      jax.default_matmul_precision("default"),
    ):
      lowered = arithmetic.build(other, machine, devices).training.lowered()
    programs = tpu_compiler.compiled_memory(
      {"value_update": lowered["value_update"]}, machine
    )
    needs, guess = (
      arithmetic.program_peaks(other, machine, found)["value_update"] - resident
      for found in (programs, {})
    )
    ratios[word] = guess / needs
  assert {k: v for k, v in ratios.items() if not 0.85 < v < 1.25} == {}, ratios
