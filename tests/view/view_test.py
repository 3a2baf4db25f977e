"""The page of runs: what it holds, and that what runs say stays data."""

import base64
import hashlib
import html
import html.parser
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.view import collect, page

HOSTILE = "</script><script>document.title='taken'</script><img src=x>\u2028"
ROOT = pathlib.Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def rollout(number, text="Ada", em=1.0):
  return {
    "id": f"q{number}", "episode": number, "question": f"Who {number}?",
    "answers": ["Ada"], "prediction": text, "em": em, "f1": em, "hops": 2,
    "stop_reason": "answer", "reward": 1.5, "outcome": 1.0, "prompt": "Go",
    "start": 7,
    "turns": [
      {"action": "search", "content": "Ada", "failed": False, "position": 8,
       "gain": 0.5, "redundancy": 0.0, "key": 0.25, "step": 0.3, "paid": 0.5,
       "documents": [{"title": text, "text": text, "support": True,
                      "repeated": False}]},
      {"action": "answer", "content": text, "failed": False, "position": 10,
       "gain": 0.0, "redundancy": 0.0, "key": 0.0, "step": 0.0, "paid": 1.0,
       "documents": []},
    ],
    "tokens": [
      {"text": "<search>", "turn": 0, "values": [0.0, 1, -1, 0, 0.5, 2]},
      {"text": " Ada", "turn": 0, "values": [0.5, 1, -1, 0, 0.5, 2]},
      {"text": "document", "turn": 0},
      {"text": text, "turn": 1, "values": [1.0, -2, -3, 0.1, 0.4, 1]},
    ],
  }


def write_run(folder, rollouts, seed=0):
  (folder / "trajectories").mkdir(parents=True)
  for step in (1, 10):
    (folder / "trajectories" / f"step_{step:06d}.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in rollouts)
    )
  (folder / "metrics.jsonl").write_text(
    '{"step": 0, "val/em": 0.25}\n{"step": 10, "val/em": 0.5}\n{"st'
  )
  (folder / "config.json").write_text(json.dumps(
    {"config": {"seed": seed, "ppo": {"policy_lr": 0.001}}, "changes": []}
  ))
  (folder / "summary.json").write_text(json.dumps({"em_after": 0.5}))
  return epath.Path(folder)


def test_the_page_holds_settings_curves_and_rollouts(tmp_path):
  run = write_run(tmp_path / "a", [rollout(i) for i in range(4)])
  (found,) = collect.collect([run], limit=6)["runs"]
  assert found["settings"] == {"ppo.policy_lr": "0.001", "seed": "0"}
  assert found["curves"]["val/em"] == [[0, 0.25], [10, 0.5]]
  # The limit is spread over the steps, the first rollouts of each.
  assert [(r["step"], r["id"]) for r in found["rollouts"]] == [
    (1, "q0"), (1, "q1"), (1, "q2"), (10, "q0"), (10, "q1"), (10, "q2")
  ]
  row = found["rollouts"][0]
  assert row["searches"] == 1 and row["texts"][3] == "Ada"
  assert row["values"][2] == [] and row["values"][3][1] == -2


def evaluated(number, text="Ada", em=1.0):
  """A rollout of which only reward and log-probability are known."""
  row = rollout(number, text, em)
  for token in row["tokens"]:
    if "values" in token:
      earned, _, logp, *_ = token["values"]
      token["values"] = [earned, None, logp, None, None, None]
  return row


def write_evaluation(run, name, rollouts):
  folder = run / "evaluations" / name
  folder.mkdir(parents=True)
  (folder / "trajectories.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rollouts)
  )


def test_rollouts_of_evaluations_are_there_with_what_is_known(tmp_path):
  run = write_run(tmp_path / "a", [rollout(0)])
  write_evaluation(run, "step_000010", [evaluated(i) for i in (1, 2)])
  write_evaluation(run, "runs_a_step_7_on_musique", [evaluated(3)])
  write_evaluation(run, "some_model", [evaluated(4)])
  (run / "evaluations/step_000001").mkdir()  # An older version's.
  (found,) = collect.collect([run], limit=100)["runs"]
  assert [(r["from"], r["place"], r["step"], r["id"])
          for r in found["rollouts"]] == [
    ("training", "step 1", 1, "q0"), ("training", "step 10", 10, "q0"),
    ("evaluation", "evaluation runs_a_step_7_on_musique", 7, "q3"),
    ("evaluation", "evaluation some_model", None, "q4"),
    ("evaluation", "evaluation step_000010", 10, "q1"),
    ("evaluation", "evaluation step_000010", 10, "q2"),
  ]
  row = found["rollouts"][-1]
  assert row["values"] == [
    [0.0, None, -1.0, None, None, None], [0.5, None, -1.0, None, None, None],
    [], [1.0, None, -3.0, None, None, None],
  ]


def test_a_failed_search_is_no_search(tmp_path):
  failed = rollout(0)
  failed["turns"].insert(0, failed["turns"][0] | {"failed": True})
  run = write_run(tmp_path / "a", [failed])
  (found,) = collect.collect([run], limit=1)["runs"]
  assert found["rollouts"][0]["searches"] == 1


def test_a_folder_without_a_run_is_one_line(tmp_path):
  with pytest.raises(types.UserError, match="no run .expected metrics.jsonl"):
    collect.collect([epath.Path(tmp_path)], 10)


@pytest.mark.parametrize("name, content, said", [
  ("config.json", '{"config": {"see', "config.json:1: malformed JSON"),
  ("config.json", "[]", "config.json: expected a JSON object, got list"),
  ("config.json", "{}", "config.json: field config: expected dict"),
  ("config.json", '{"config": 5}', "field config: expected dict, got 5"),
  ("summary.json", "", "summary.json:1: malformed JSON"),
])
def test_a_damaged_file_of_a_run_is_one_line(tmp_path, name, content, said):
  run = write_run(tmp_path / "a", [rollout(0)])
  (run / name).write_text(content)
  with pytest.raises(types.UserError, match=said):
    collect.collect([run], 10)


def test_of_damaged_lines_only_the_whole_rows_are_shown(tmp_path):
  run = write_run(tmp_path / "a", [])
  whole = json.dumps(rollout(0, "\u2028é"), ensure_ascii=False).encode()
  (run / "trajectories/step_000001.jsonl").write_bytes(
    b"7\n" + b"[" * 100_000 + b"\n" + whole + b"\n" + whole[:-9] + b"\xc3"
  )
  (found,) = collect.collect([run], 10)["runs"]
  assert [row["prediction"] for row in found["rollouts"]] == ["\u2028é"]


class Tags(html.parser.HTMLParser):
  """Collects start tags and the text of scripts."""

  def __init__(self):
    super().__init__()
    self.tags, self.scripts = [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag == "script":
      self.scripts.append("")

  def handle_endtag(self, tag):
    self.tags.append("/" + tag)

  def handle_data(self, text):
    if self.tags and self.tags[-1] == "script":
      self.scripts[-1] += text


def test_a_hostile_passage_stays_data_and_runs_no_script(tmp_path):
  run = write_run(tmp_path / "a", [rollout(0, HOSTILE)])
  data = collect.collect([run], 10)
  text = page.render(data)
  parsed = Tags()
  parsed.feed(text)
  parsed.close()
  scripts = parsed.scripts
  assert parsed.tags.count("script") == 2 and "img" not in parsed.tags
  assert json.loads(scripts[0]) == data  # Nothing was lost.
  (allowed,) = re.findall(r"script-src 'sha256-([^']+)'", text)
  digest = hashlib.sha256(scripts[1].encode()).digest()
  assert allowed == base64.b64encode(digest).decode()
  assert "innerHTML" not in scripts[1]
  assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")


def test_a_thousand_rollouts_stay_small(tmp_path):
  long = rollout(0)
  long["tokens"] = long["tokens"] * 40
  run = write_run(tmp_path / "a", [long] * 500)
  text = page.render(collect.collect([run], 1000))
  assert len(text.encode()) < 20e6


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 2])
def test_a_page_keeps_to_its_size_and_counts_what_it_leaves_out(
  tmp_path, share
):
  rollouts = [rollout(i, "\u00e9" * 50 * (i + 1)) for i in range(8)]
  run = write_run(tmp_path / "a", rollouts)
  write_evaluation(run, "step_000010", rollouts[:3])
  data = collect.collect([run], limit=24)
  assert data["left_out"] == 0
  bare = dict(data["runs"][0], rollouts=[])
  least = len(page.render({**data, "runs": [bare]}).encode())
  whole = len(page.render(data).encode())
  most = int(least + share * (whole - least))
  made = page.bound(data, most)
  assert len(page.render(made).encode()) <= max(most, least + 9)
  (found,) = made["runs"]
  kept = found["rollouts"]
  assert len(kept) + made["left_out"] == 19
  assert [r for r in data["runs"][0]["rollouts"] if r in kept] == kept
  counts = [sum(r["place"] == place for r in kept)
            for place in ("step 1", "step 10", "evaluation step_000010")]
  if share == 2:
    assert made == data
  elif share:
    # The first ones of each are there, about as many of every step.
    assert abs(counts[0] - counts[1]) <= 1 and counts[2] >= min(counts[0], 3)
    assert 0 < len(kept) < 19
  else:
    assert kept == []
  assert {k: v for k, v in found.items() if k != "rollouts"} == {
    k: v for k, v in bare.items() if k != "rollouts"}


def test_rollouts_past_the_limit_count_as_left_out(tmp_path):
  run = write_run(tmp_path / "a", [rollout(i) for i in range(4)])
  assert collect.collect([run], limit=6)["left_out"] == 2


def browser(user, *arguments):
  """The command of a browser of its own."""
  return [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
          "--disable-background-networking", f"--user-data-dir={user}",
          *arguments]


def browse(user, address):
  """The DOM of a page in a browser, as text."""
  return subprocess.run(
    browser(user, "--dump-dom", address), capture_output=True, text=True,
    timeout=120,
  ).stdout


def test_a_run_that_has_only_begun_is_shown(tmp_path):
  run = write_run(tmp_path / "a", [])
  (run / "metrics.jsonl").unlink()
  (found,) = collect.collect([run], 10)["runs"]
  assert found["curves"] == {} and found["settings"]["seed"] == "0"


def test_the_command_takes_runs_by_place_and_by_flag(tmp_path):
  runs = [write_run(tmp_path / name, [rollout(0)]) for name in "abc"]
  done = subprocess.run(
    [sys.executable, "-m", "stepsearch_jax", "view", "a", "b",
     f"--workdir={runs[2]}", "--output=r.html"], cwd=tmp_path,
    capture_output=True, text=True, timeout=120,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )
  assert done.stdout.startswith("r.html: 3 runs, 6 rollouts"), done.stderr


IN_BROWSER = pytest.mark.skipif(
  CHROMIUM is None, reason="chromium is not installed"
)


@IN_BROWSER
def test_a_live_page_loads_itself_again_whatever_it_shows(tmp_path):
  run = write_run(tmp_path / "a", [rollout(0), rollout(1, "Bo", 0.0)])
  text = page.render(collect.collect([run], 100), refresh=1).encode()
  loads = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      loads.append(self.path)
      self.send_response(200)
      self.send_header("Content-Type", "text/html; charset=utf-8")
      self.end_headers()
      self.wfile.write(text)

    def log_message(self, *unused):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}/#rollouts?right=wrong"
    with subprocess.Popen(browser(tmp_path / "user", place)) as process:
      for _ in range(600):
        if loads.count("/") > 2:
          break
        time.sleep(0.1)
      process.terminate()
    server.shutdown()
  assert loads.count("/") > 2


@IN_BROWSER
def test_the_page_works_inside_another_one(tmp_path):
  run = write_run(tmp_path / "a", [rollout(0)])
  text = html.escape(page.render(collect.collect([run], 100)))
  outer = tmp_path / "notebook.html"
  outer.write_text(f"""<iframe srcdoc="{text}"></iframe><p id="seen"></p>
    <script>window.onload = () => {{
      const inner = document.querySelector("iframe").contentDocument;
      inner.querySelectorAll("header button")[2].click();
      document.getElementById("seen").textContent =
        inner.querySelector("main").textContent;
    }};</script>""")
  shown = browse(tmp_path / "user", f"file://{outer}")
  assert "2 of 2 rollouts" in shown.partition('id="seen"')[2]


@IN_BROWSER
@pytest.mark.parametrize("address, wanted, unwanted", [
  ("overview", ["em_after", "Settings that differ", "ppo.policy_lr"], []),
  ("curves", ["val/em", "step 10"], []),
  ("rollouts", ["8 of 8 rollouts", "Who 1?"], []),
  ("rollouts?right=right&text=who+1&sort=reward&down=true",
   ["4 of 8 rollouts", "reward \u25be"], []),
  ("rollouts/0", ["Wanted: Ada", "support", "gain 0.500"], ["taken"]),
  ("rollouts/0/4", ["b, step 1"], ["taken"]),
  ("rollouts?from=evaluation",
   ["2 of 6 rollouts; 3 more are not in this page"], []),
  ("rollouts/2?color=1",
   ["a, evaluation step_000010", "advantage: not known of this rollout",
    "token absent"], []),
])
def test_a_browser_shows_it(tmp_path, address, wanted, unwanted):
  runs = [
    write_run(tmp_path / name, [rollout(0, HOSTILE, 0.0), rollout(1)], seed)
    for seed, name in enumerate("ab")
  ]
  if "evaluation" in address or "color" in address:
    for run in runs:
      (run / "trajectories/step_000010.jsonl").unlink()
      write_evaluation(run, "step_000010", [evaluated(0)])
  file = tmp_path / "report.html"
  file.write_text(page.render({**collect.collect(runs, 100), "left_out": 3}))
  whole = browse(tmp_path / "user", f"file://{file}#{address}")
  shown = whole.partition("<main")[2].partition("</main>")[0]
  for text in wanted:
    assert text in shown, (text, shown[:2000])
  title = re.search(r"<title>(.*?)</title>", whole)[1]
  assert title == "stepsearch_jax: runs"
  assert not any(f"<title>{text}" in whole for text in unwanted)


@IN_BROWSER
@pytest.mark.parametrize("color, blank", [(0, True), (5, False)])
def test_the_address_holds_the_color(tmp_path, color, blank):
  run = write_run(tmp_path / "a", [rollout(0)])  # One token earns 0.
  file = tmp_path / "report.html"
  file.write_text(page.render(collect.collect([run], 100)))
  shown = browse(tmp_path / "user", f"file://{file}#rollouts/0?color={color}")
  article = shown.partition("<article>")[2].partition("</article>")[0]
  assert "background:rgba" in article
  assert ("background:transparent" in article) == blank
