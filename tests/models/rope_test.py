"""Rotary frequencies against loops written from the papers' equations."""

import math

import numpy as np
import pytest

from stepsearch_jax.models import rope


def plain(dim, theta):
  return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def llama3(dim, theta, factor, original, low, high):
  """Llama 3.1's model card, frequency by frequency."""
  out = []
  for frequency in plain(dim, theta):
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
      out.append(frequency)
    elif wavelength > original / low:
      out.append(frequency / factor)
    else:
      smooth = (original / wavelength - low) / (high - low)
      out.append((1 - smooth) * frequency / factor + smooth * frequency)
  return out


def yarn(dim, theta, factor, original, slow, fast, truncate):
  """YaRN, equations 17 to 23 in terms of dimensions."""
  def where(turns):
    return dim * math.log(original / (2 * math.pi * turns)) / (
      2 * math.log(theta)
    )

  first, last = where(fast), where(slow)
  if truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, dim - 1)
  out = []
  for i, frequency in enumerate(plain(dim, theta)):
    ramp = min(max((i - first) / (last - first), 0), 1)
    out.append(ramp * frequency / factor + (1 - ramp) * frequency)
  return out


@pytest.mark.parametrize(("scaling", "want", "scale"), [
  (None, plain(64, 5e5), 1.0),
  (rope.RopeScaling("linear", 4.0, 2048),
   [f / 4 for f in plain(64, 5e5)], 1.0),
  (rope.RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
   llama3(64, 5e5, 8.0, 8192, 1.0, 4.0), 1.0),
  (rope.RopeScaling("yarn", 4.0, 2048, 1.0, 32.0),
   yarn(64, 5e5, 4.0, 2048, 1, 32, True), 0.1 * math.log(4) + 1),
  (rope.RopeScaling("yarn", 4.0, 2048, 2.0, 16.0, 1.3, False),
   yarn(64, 5e5, 4.0, 2048, 2, 16, False), 1.3),
  (rope.RopeScaling("yarn", 0.5, 2048, 1.0, 32.0),
   yarn(64, 5e5, 0.5, 2048, 1, 32, True), 1.0),
  (rope.RopeScaling("factors", 1.0, 8, factors=tuple(range(1, 33))),
   [f / (i + 1) for i, f in enumerate(plain(64, 5e5))], 1.0),
])
def test_frequencies_are_those_of_the_equations(scaling, want, scale):
  ours, factor = rope.frequencies(64, 5e5, scaling)
  np.testing.assert_allclose(ours, want, rtol=2e-5)
  assert factor == pytest.approx(scale, rel=1e-6)
