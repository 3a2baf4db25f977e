"""Where a device's time goes inside one call, from JAX's profiler."""

from __future__ import annotations

import collections
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax

_LARGEST = 10


def of_call(call: Callable[[], Any]) -> dict[str, Any]:
  """Profiles a call.

  Returns:
    largest_ops: [[name, share of the device's busy time], ...], the ten that
      take longest.
    busy_share: part of the time between the first and the last operation in
      which the device did something.
    Nothing on a CPU; "profile_error" where the profiler failed, since a
    figure must not be lost for that.
  """
  try:
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        jax.block_until_ready(call())
      (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
      return summary(jax.profiler.ProfileData.from_file(str(path)))
  except Exception as error:  # noqa: BLE001 - whatever a profiler raises
    return {"profile_error": f"{type(error).__name__}: {error}"[:300]}


def summary(profile: jax.profiler.ProfileData) -> dict[str, Any]:
  """See `of_call`."""
  spent, spans = collections.Counter(), []
  for plane in profile.planes:
    if not plane.name.startswith("/device:"):
      continue
    for line in plane.lines:
      if line.name == "XLA Ops" or line.name.startswith("Stream"):
        for event in line.events:
          spent[_label(event)] += event.duration_ns
          spans.append((event.start_ns, event.start_ns + event.duration_ns))
  if not spans:
    return {}
  whole = sum(spent.values()) or 1
  return {
    "largest_ops": [
      [name, ns / whole] for name, ns in spent.most_common(_LARGEST)
    ],
    "busy_share": covered(spans),
  }


def _label(event) -> str:
  """A kernel's name and, where it is known, the operation it belongs to."""
  stats = {str(name): value for name, value in event.stats}
  made_by = stats.get("tf_op") or stats.get("hlo_op") or ""
  if not made_by or made_by == event.name:
    return event.name[:80]
  return f"{event.name[:60]} <- {str(made_by)[:60]}"


def covered(spans: Iterable[tuple[float, float]]) -> float:
  """Share of the time from the first start to the last end that is covered."""
  spans = sorted(spans)
  busy, reached = 0.0, spans[0][0]
  for begin, end in spans:
    busy += max(end - max(begin, reached), 0.0)
    reached = max(reached, end)
  return busy / max(reached - spans[0][0], 1e-9)
