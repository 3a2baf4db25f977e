"""Trackers, by stand-ins with the calls that both packages share."""

import sys
import types

import pytest

from stepsearch_jax.run import metrics, trackers


@pytest.fixture(params=trackers.NAMES)
def package(request, monkeypatch):
  """A stand-in for the package that writes down its calls."""
  calls = []
  page = types.SimpleNamespace(
    log=lambda values, step: calls.append((step, values)),
    finish=lambda: calls.append("finished"),
  )
  fake = types.SimpleNamespace(
    init=lambda **given: calls.append(given) or page,
    Table=lambda **given: given, calls=calls, name=request.param,
  )
  monkeypatch.setitem(sys.modules, request.param, fake)
  return fake


def opened(package, folder, config=None):
  return trackers.start(package.name, "mine", folder, config or {})


def test_a_resumed_run_goes_on_with_its_page_and_tells_no_secrets(
  tmp_path, package
):
  config = {"retrieval": {
    "remote": "https://me:secret@host:81/retrieve?key=hidden", "topk": 3,
  }, "urls": ("http://a:b@c/d",), "seed": 0}
  for folder in ("a", "a", "b"):
    metrics.MetricsWriter(
      tmp_path / folder, 0, opened(package, tmp_path / folder, config)
    ).close()
  first, again, other = [c for c in package.calls if c != "finished"]
  names_it = {"wandb": "id", "trackio": "name"}[package.name]
  assert first[names_it] == again[names_it] != other[names_it]
  assert {o["resume"] for o in (first, again, other)} == {"allow"}
  assert {o["project"] for o in (first, again, other)} == {"mine"}
  assert first["config"] == {
    "retrieval": {"remote": "https://host:81/retrieve", "topk": 3},
    "urls": ["http://c/d"], "seed": 0,
  }
  assert package.calls.count("finished") == 3


def test_arguments_are_those_that_the_package_has(tmp_path, package):
  opened(package, tmp_path)
  (given,) = package.calls
  assert set(given) == {"project", "resume", "config"} | {
    "wandb": {"id", "dir"}, "trackio": {"name"},
  }[package.name]


def test_metrics_and_rollouts_arrive_at_their_step(tmp_path, package):
  writer = metrics.MetricsWriter(tmp_path, 0, opened(package, tmp_path))
  row = {"question": "Who?", "reward": 0.5}
  writer.write_rollouts(3, [row, row])
  writer.write_rollouts(4, [])
  writer.write(3, {"val/em": 0.25})
  writer.close()
  table = {
    "wandb": {"columns": ["question", "reward"],
              "data": [["Who?", 0.5], ["Who?", 0.5]]},
    "trackio": {"data": [row, row]},
  }[package.name]
  assert package.calls[1:] == [
    (3, {"trajectories": table}), (3, {"val/em": 0.25}), "finished"
  ]


def test_no_tracker_is_none(tmp_path):
  assert trackers.start("", "mine", tmp_path, {}) is None
  assert list(tmp_path.iterdir()) == []
