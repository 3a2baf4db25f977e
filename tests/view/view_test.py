"""The page of runs: what it holds, and that what runs say stays data."""

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess

import pytest
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.view import collect, page

HOSTILE = "</script><script>document.title='taken'</script><img src=x>\u2028"
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


def test_a_failed_search_is_no_search(tmp_path):
  failed = rollout(0)
  failed["turns"].insert(0, failed["turns"][0] | {"failed": True})
  run = write_run(tmp_path / "a", [failed])
  (found,) = collect.collect([run], limit=1)["runs"]
  assert found["rollouts"][0]["searches"] == 1


def test_a_folder_without_a_run_is_one_line(tmp_path):
  with pytest.raises(types.UserError, match="no run .expected metrics.jsonl"):
    collect.collect([epath.Path(tmp_path)], 10)


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


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("address, wanted, unwanted", [
  ("overview", ["em_after", "Settings that differ", "ppo.policy_lr"], []),
  ("curves", ["val/em", "step 10"], []),
  ("rollouts", ["8 of 8 rollouts", "Who 1?"], []),
  ("rollouts/0", ["Wanted: Ada", "support", "gain 0.500"], ["taken"]),
  ("rollouts/0/4", ["b, step 1"], ["taken"]),
])
def test_a_browser_shows_it(tmp_path, address, wanted, unwanted):
  runs = [
    write_run(tmp_path / name, [rollout(0, HOSTILE, 0.0), rollout(1)], seed)
    for seed, name in enumerate("ab")
  ]
  file = tmp_path / "report.html"
  file.write_text(page.render(collect.collect(runs, 100)))
  done = subprocess.run(
    [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
     "--disable-background-networking", f"--user-data-dir={tmp_path}/user",
     "--dump-dom", f"file://{file}#{address}"],
    capture_output=True, text=True, timeout=120,
  )
  shown = done.stdout.partition("<main")[2].partition("</main>")[0]
  for text in wanted:
    assert text in shown, (text, shown[:2000])
  title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
  assert title == "stepsearch_jax: runs"
  assert not any(f"<title>{text}" in done.stdout for text in unwanted)
