"""The scoring command: a line out for every line in, whatever happens."""

import gzip
import json
import subprocess
import sys

import pytest

from stepsearch_jax.rewards import step_rewards
from stepsearch_jax.tools import score as score_tool

GOOD = "<search> q </search>\n\n<information> Doc 1<## Title: T ##> alpha beta"
ROWS = [
  {"id": "a", "target": "Paris", "search_keys": [["q"]],
   "support_docs": [{"title": "T", "paragraph_text": "alpha beta"}],
   "response": GOOD + " </information>\n\n<answer> Paris </answer>"},
  {"id": "b", "target": 3, "response": "<answer> 3 </answer>"},
  {"id": "c", "golden_answers": ["Rome"], "response":
   "<search>q</search><information>Doc 1(Title: \"T\") x\n</information>"
   "<answer>Rome city</answer>"},
]


def score(tmp_path, preset, rows):
  source, output = tmp_path / "cases.jsonl", tmp_path / "scores.jsonl"
  source.write_text("".join(json.dumps(row) + "\n" for row in rows))
  done = subprocess.run(
    [sys.executable, "-m", "stepsearch_jax.tools.score", f"--preset={preset}",
     f"--input={source}", f"--output={output}"],
    capture_output=True, text=True,
  )
  return done, [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_every_line_is_answered_in_order(tmp_path, preset):
  done, scores = score(tmp_path, preset, ROWS)
  assert done.returncode == 1, done.stderr
  assert [row["id"] for row in scores] == ["a", "b", "c"]
  assert scores[0]["score"] == pytest.approx(1.618)
  assert scores[0]["information_gains"] == pytest.approx([1.0])
  assert scores[1]["error"].startswith("TypeError: target must be")
  assert scores[2]["answer_correct"] == pytest.approx(2 / 3, abs=1e-4)
  assert "2 of 3 rows scored" in done.stdout


def test_a_file_without_errors_ends_well(tmp_path):
  done, scores = score(tmp_path, "paper", [ROWS[0], ROWS[2]])
  assert done.returncode == 0, done.stderr
  assert len(scores) == 2


def test_every_recorded_case_gives_what_is_expected(shared):
  folder = shared / "cases/score"
  for line in (folder / "expected.jsonl").read_text().splitlines():
    case = json.loads(line)
    for preset in step_rewards.PRESETS:
      spec = step_rewards.PRESETS[preset]()
      rows = list(score_tool.score_file(spec, str(folder / case["file"])))
      assert ["error" if "error" in row else "ok" for row in rows] == (
        case["lines"]), case
      if preset == "paper":
        for name in ("search_key_score", "paper_score"):
          field = name.removeprefix("paper_")
          found = [row.get(field) for row in rows]
          assert found == case.get(name, found), case


def scored(row, preset="paper"):
  """Of ROWS[0] with other fields, or without where these are `...`."""
  row = {k: v for k, v in {**ROWS[0], **row}.items() if v is not ...}
  return score_tool.score_row(step_rewards.PRESETS[preset](), row, 1, "f:7")


SUPPORT = ROWS[0]["support_docs"]
KEYS = {"reward_model": {"ground_truth": {"target": "Paris",
                                          "search_keys": [["q"]]}}}


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("row", [
  {"search_keys": None, **KEYS}, {"search_keys": [], **KEYS},
  {"search_keys": ..., **KEYS}, {"search_keys": [], "target": ..., **KEYS},
  {"search_keys": ..., "sub_searchs": [["q"]]},
  {"search_keys": None, "reward_model": json.dumps(KEYS["reward_model"])},
  {"support_docs": None, "extra_info": {"support_docs": SUPPORT}},
  {"support_docs": [], "extra_info": json.dumps({"support_docs": SUPPORT})},
  {"support_docs": ..., "sub_support_docs": SUPPORT},
  {"target": [], "golden_answers": ["Paris"]},
  {"target": "", "ground_truth": "Paris"},
  {"target": ..., "golden_answers": [], "ground_truth": "Paris"},
  {"target": None, "reward_model": {"ground_truth": ["Paris"]}},
  {"target": ..., "gts": {"target": ["Paris"]}},
], ids=str)
def test_an_empty_field_leaves_the_word_to_one_that_is_filled(row, preset):
  row = scored(row, preset)
  assert row["score"] == pytest.approx(1.618)
  assert row["information_gains"] == pytest.approx([1.0])


@pytest.mark.parametrize("row, released", [
  ({"target": '["Paris", "Lutetia"]'}, 2 / 3),  # One text of two words.
  ({"target": "Lutetia", "answer_aliases": ["Paris"]}, 0.0),
  ({"target": ["Lutetia"], "aliases": ["Paris"]}, 0.0),
  ({"support_docs": ["alpha beta"]}, "TypeError: support_docs must hold "
   "objects with paragraph_text, got \"['alpha beta']\""),
  ({"support_docs": json.dumps(SUPPORT)}, "TypeError: support_docs must hold"),
  ({"support_docs": [{"text": "alpha beta"}]}, "KeyError: a support document "
   "needs paragraph_text"),
], ids=str)
def test_json_text_aliases_and_texts_are_read_but_as_released(row, released):
  assert scored(row)["score"] == pytest.approx(1.618)
  assert scored(row)["information_gains"] == pytest.approx([1.0])
  raw = scored(row, "released")
  if isinstance(released, str):
    assert raw["error"].startswith(released)
  else:
    assert raw["answer_correct"] == pytest.approx(released, abs=1e-4)


@pytest.mark.parametrize("row, error, raw", [
  ({"support_docs": "alpha"}, "DataError: f:7: field support_docs must hold a "
   "list of objects, got 'alpha'", "TypeError: support_docs must hold objects"),
  ({"support_docs": [{"paragraph_text": None}]},
   "DataError: f:7: field support_docs.paragraph_text must hold text, got None",
   "AttributeError: support_docs.paragraph_text must hold text, got None"),
  ({"search_keys": [[1998]]}, "DataError: f:7: field search_keys must hold",
   "AttributeError: search_keys must hold text, got 1998"),
  ({"support_docs": None, "extra_info": "x"},
   "DataError: f:7: field extra_info must hold an object, got 'x'", None),
  ({"search_keys": None, "reward_model": "x"},
   "DataError: f:7: field reward_model must hold an object, got 'x'", None),
  ({"target": {"a": 1}}, "DataError: f:7: field target must hold answers",
   "TypeError: target must be a string or a list, got {'a': 1}"),
  *(({"target": none}, "DataError: f:7: field target must hold gold answers, "
     f"got {none!r}", 0.0) for none in ("", [])),
], ids=str)
def test_errors_name_the_field(row, error, raw):
  assert scored(row)["error"].startswith(error)
  released = scored(row, "released")
  if raw == 0.0:
    assert released["answer_correct"] == 0.0
  else:
    assert released["error"].startswith(raw or error)


def test_a_file_without_rows_is_an_error(tmp_path):
  source = tmp_path / "none.jsonl"
  source.write_text("\n")
  done = subprocess.run(
    [sys.executable, "-m", "stepsearch_jax.tools.score", f"--input={source}",
     f"--output={tmp_path}/scores.jsonl"], capture_output=True, text=True,
  )
  assert done.returncode == 1
  assert "none.jsonl: no trajectories in the file" in done.stderr
  assert not (tmp_path / "scores.jsonl").exists()


def test_a_gold_answer_without_words_stays_as_recorded_when_released():
  row = {"target": ["The The"], "response": "<answer> The The </answer>"}
  for preset, score in (("paper", 1.0), ("released", 0.0)):
    spec = step_rewards.PRESETS[preset]()
    assert score_tool.score_row(spec, row, 1)["score"] == score
  row["response"] = "<answer> </answer>"
  assert score_tool.score_row(
    step_rewards.PRESETS["paper"](), row, 1)["score"] == 0.0


@pytest.mark.parametrize("wrong", [
  None, 5, True, 1.5, "", "text", [], {}, [None], [5], ["t"], [["t"]],
  {"a": 1}, [{}], [[]], [[None]], [[5]],
], ids=repr)
def test_whatever_a_row_holds_one_line_comes_out(tmp_path, wrong):
  rows = []
  for name in ("id", "target", "response", "search_keys", "support_docs",
               "reward_model", "extra_info", "golden_answers"):
    rows += [{**ROWS[0], name: wrong}, {**ROWS[2], name: wrong}]
    if name == "reward_model":
      rows.append({"response": "<answer>x</answer>",
                   name: {"ground_truth": wrong}})
      rows.append({"response": "<answer>x</answer>",
                   name: {"ground_truth": {"target": wrong,
                                           "search_keys": wrong}}})
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  for spec in (step_rewards.RewardSpec.paper(),
               step_rewards.RewardSpec.released()):
    scored = list(score_tool.score_file(spec, str(path)))
    assert len(scored) == len(rows)
    for row in scored:
      assert ("error" in row) != ("score" in row)
      assert json.loads(json.dumps(row)) == row


def test_lines_that_are_no_rows_are_answered_and_lose_no_others(tmp_path):
  good = json.dumps(ROWS[0]).encode()
  lines = [b"[1]", good, b'{"id": "cut', b"5", b"null", b"\xff\xfe", good,
           b"[" * 100_000]
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b"\n".join(lines))
  spec = step_rewards.RewardSpec.paper()
  scored = list(score_tool.score_file(spec, str(path)))
  assert ["score" in row for row in scored] == [
    line is good for line in lines]
  packed = gzip.compress(b"\n".join([good] * 2000))
  path = tmp_path / "rows.jsonl.gz"
  path.write_bytes(packed[: len(packed) - 20])
  scored = list(score_tool.score_file(spec, str(path)))
  assert "gzip" in scored[-1]["error"]
  assert len(scored) > 1 and "score" in scored[0]
