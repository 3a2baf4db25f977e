"""One self-contained HTML page over runs: no network, opens from a mail.

Everything that runs were asked, shown or wrote is data here: it travels as
JSON in which nothing can end the element, the page puts it on the screen as
text, and its policy lets no other script run.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import json
from typing import Any

from etils import epath

_HERE = epath.Path(__file__).parent


def bound(data: dict[str, Any], most: int) -> dict[str, Any]:
  """Returns the data of a page of at most so many bytes.

  Whole rollouts are left out, of every step and evaluation the last ones
  first, and counted. Everything else stays, however large.

  Args:
    data: see `collect.collect`.
    most: bytes of the page.
  """
  runs = data["runs"]
  count = sum(len(run["rollouts"]) for run in runs)
  empty = {**data, "runs": [{**run, "rollouts": []} for run in runs],
           "left_out": data["left_out"] + count}
  room = most - len(render(empty).encode())
  seen: dict[Any, int] = collections.Counter()
  ranked = []  # (place within step or evaluation, run, place in the run)
  for number, run in enumerate(runs):
    for i, row in enumerate(run["rollouts"]):
      source = number, row["place"]
      ranked.append((seen[source], number, i))
      seen[source] += 1
  kept: list[list[int]] = [[] for _ in runs]
  for _, number, i in sorted(ranked):
    size = len(embed(runs[number]["rollouts"][i]).encode()) + 1
    if size <= room:
      kept[number].append(i)
      room -= size
  return {
    **data,
    "runs": [
      {**run, "rollouts": [run["rollouts"][i] for i in sorted(places)]}
      for run, places in zip(runs, kept, strict=True)
    ],
    "left_out": empty["left_out"] - sum(map(len, kept)),
  }


def render(data: dict[str, Any], refresh: int = 0) -> str:
  """Returns the page.

  Args:
    data: see `collect.collect`.
    refresh: seconds after which the page loads itself again; 0 never does.
  """
  script = "\n".join(
    (_HERE / name).read_text() for name in ("elements.js", "page.js")
  )
  style = (_HERE / "page.css").read_text()
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = (f"default-src 'none'; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'")
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>stepsearch_jax: runs</title><style>{style}</style></head>
<body><header id="header"></header>
<main id="main" data-refresh="{refresh}"></main>
<script type="application/json" id="data">{embed(data)}</script>
<script>{script}</script></body></html>
"""


def embed(data: Any) -> str:
  """Returns JSON that can stand inside a script element."""
  text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
  for character in "<>&\u2028\u2029":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text
