"""Shows runs as one HTML page: settings, curves, rollouts with their credit.

  stepsearch view runs/quickstart --output=report.html
  stepsearch view runs/a runs/b --output=report.html
  stepsearch view runs/quickstart --live

The page needs no network and opens from a mail. In it every token of the
policy can be colored by reward, advantage, log-probability, KL, value or
entropy; rollouts of evaluations know reward and log-probability. Two runs, or
two steps, stand side by side on the same question.
"""

from __future__ import annotations

import http.server
from typing import Any

from absl import flags
from etils import epath

from stepsearch_jax import cli, files, types
from stepsearch_jax.view import collect, page

_WORKDIR = flags.DEFINE_list(
  "workdir", [], "Further runs, separated by commas."
)
_OUTPUT = flags.DEFINE_string("output", "report.html", "HTML file to write.")
_ROLLOUTS = flags.DEFINE_integer(
  "rollouts", 1000, "Rollouts in the page at most.", lower_bound=0
)
_MEGABYTES = flags.DEFINE_float(
  "megabytes", 20.0, "Size of the page at most; further rollouts are left out, "
  "which the page says.", lower_bound=0
)
_LIVE = flags.DEFINE_bool(
  "live", False, "Serve the page on this machine while runs go on."
)
_PORT = flags.DEFINE_integer("port", 8899, "Port of --live.")
_REFRESH = flags.DEFINE_integer(
  "refresh", 30, "Seconds between two loads of a live page."
)


def _collect(workdirs: list[epath.Path]) -> dict[str, Any]:
  """Returns the data of a page that keeps to the flags' limits."""
  data = collect.collect(workdirs, _ROLLOUTS.value)
  return page.bound(data, int(1e6 * _MEGABYTES.value))


def serve(workdirs: list[epath.Path]) -> None:
  """Serves a page that is made anew at every load, until interrupted."""

  class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every request with the page."""

    def do_GET(self) -> None:
      """Sends the page."""
      body = page.render(_collect(workdirs), _REFRESH.value).encode()
      self.send_response(200)
      self.send_header("Content-Type", "text/html; charset=utf-8")
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *unused) -> None:
      """Logs nothing."""

  with http.server.ThreadingHTTPServer(
    ("127.0.0.1", _PORT.value), Handler
  ) as server:
    print(f"http://127.0.0.1:{_PORT.value}  (Ctrl-C ends it)", flush=True)
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      print()


def main(argv: list[str]) -> None:
  """Entry; see the module docstring."""
  folders = [*argv, *_WORKDIR.value]
  types.expect(bool(folders), "stepsearch view", "one run or more", folders)
  workdirs = [epath.Path(folder) for folder in folders]
  data = _collect(workdirs)
  if _LIVE.value:
    serve(workdirs)
    return
  text = page.render(data)
  files.write_text(epath.Path(_OUTPUT.value), text)
  count = sum(len(run["rollouts"]) for run in data["runs"])
  print(f"{_OUTPUT.value}: {len(data['runs'])} runs, {count} rollouts, "
        f"{len(text.encode()) / 1e6:.1f} MB")
  if data["left_out"]:
    print(f"{data['left_out']} rollouts of the runs are left out: "
          "--rollouts and --megabytes bound the page")


if __name__ == "__main__":
  cli.run(main, arguments=True)
