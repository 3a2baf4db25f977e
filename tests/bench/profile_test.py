"""A device's busy time and largest operations, from events set up by hand."""

import types

import pytest

from stepsearch_jax.bench import profile


def _event(name, start, duration, **stats):
  return types.SimpleNamespace(
    name=name, start_ns=start, duration_ns=duration, stats=stats.items()
  )


def _plane(name, **lines):
  return types.SimpleNamespace(name=name, lines=[
    types.SimpleNamespace(name=line.replace("_", " "), events=events)
    for line, events in lines.items()
  ])


def test_overlapping_and_nested_operations_are_busy_once():
  assert profile.covered([(0, 4), (1, 2), (3, 6), (8, 10)]) == 0.8
  assert profile.covered([(5, 7)]) == 1.0


def test_only_the_devices_operations_are_summed():
  events = [_event("gemm", 0, 6, hlo_op="dot.1"), _event("copy", 8, 2)]
  found = profile.summary(types.SimpleNamespace(planes=[
    _plane("/device:GPU:0", Stream_1=events, Steps=[_event("step", 0, 100)]),
    _plane("/host:CPU", Stream_2=[_event("python", 0, 50)]),
  ]))
  assert found["largest_ops"] == [["gemm <- dot.1", 0.75], ["copy", 0.25]]
  assert found["busy_share"] == pytest.approx(0.8)


def test_a_profile_without_a_device_says_nothing():
  planes = [_plane("/host:CPU", Stream_1=[_event("python", 0, 50)])]
  assert profile.summary(types.SimpleNamespace(planes=planes)) == {}


def test_a_failing_profiler_costs_no_figure():
  def call():
    raise RuntimeError("no CUPTI")

  assert profile.of_call(call) == {"profile_error": "RuntimeError: no CUPTI"}
