"""Counts of work against hand-worked numbers; the suite runs on any device."""

import dataclasses
import os
import platform

import jax
import jax.numpy as jnp
import pytest

from stepsearch_jax.bench import accelerator, growth
from stepsearch_jax.plan import machines

SMALL = dataclasses.replace(
  growth.small_decoder(), vocab_size=100, hidden_size=8, intermediate_size=16,
  num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, qkv_bias=False,
)
# A layer: q 8x8, k and v 8x4 each, o 8x8, three of 8x16, two norms of 8.
LAYERS = 3 * (64 + 64 + 64 + 3 * 128 + 16)


def test_work_is_counted_as_by_hand():
  assert accelerator.trunk_weights(SMALL) == LAYERS
  # Attention: two products of 2 x 8 x 5 a token and layer, at half of 10.
  dense = 20 * (2 * LAYERS + 3 * 2 * 2 * 8 * 5)
  assert accelerator.forward_flops(SMALL, 2, 10, 0) == dense
  assert accelerator.forward_flops(SMALL, 2, 10, 7) == dense + 7 * 2 * 800
  # Keys and values of 4 numbers in 3 layers; float32, then bfloat16.
  numbers = LAYERS + 800 + 5 * 6 * 2 * 3 * 4
  assert accelerator.decode_bytes(SMALL, 5, 6) == 4 * numbers
  half = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
  assert accelerator.decode_bytes(half, 5, 6) == 2 * numbers


@pytest.mark.parametrize("platform, kind, name", [
  ("gpu", "NVIDIA H100 80GB HBM3", "gpu-h100"),
  ("gpu", "NVIDIA H200", "gpu-h200"),
  ("tpu", "TPU v5 lite", "v5e:1"),
  ("tpu", "TPU v5", "v5p:1"),
  ("cpu", "cpu", "cpu"),
])
def test_a_device_is_known_by_what_it_calls_itself(platform, kind, name):
  assert machines.of_device(platform, kind).name == name


def test_an_unknown_device_is_an_error():
  with pytest.raises(ValueError, match="GTX 970"):
    machines.of_device("gpu", "GTX 970")


def test_as_many_layers_are_trained_as_fit():
  config = accelerator.qwen3b()
  # 311 M weights of the vocabulary and 77.07 M a layer, 30 bytes each.
  assert accelerator.fitting_layers(config, 78e9) == 24  # 25.4 in 68 GB.
  assert accelerator.fitting_layers(config, 138e9) == 36  # All of them.
  assert accelerator.fitting_layers(config, 10e9) == 1


@pytest.mark.slow
def test_every_reading_of_the_suite_is_taken():
  with jax.numpy_dtype_promotion("standard"):
    readings = [
      result for r in accelerator.readings("tiny") for result in r.measure(3)
    ]
  taken = {r["what"].partition(",")[0]: r for r in readings}
  assert list(taken) == [
    "training: update", "training: scoring", "decode", "prefill", "replay"
  ]
  assert all(r["value"] > 0 and r["seconds"] > 0 for r in taken.values())


def test_processors_of_one_name_are_told_apart():
  text = ("processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: "
          "Xeon @ 2.1\nflags\t\t:\nmodel name\t: Xeon @ 2.1\n")
  assert machines.processor(text) == "Xeon @ 2.1 6/143"
  assert machines.processor("CPU part\t: 0xd0c\n") == platform.machine()
  assert machines.here().startswith(f"{os.cpu_count()} x ")
