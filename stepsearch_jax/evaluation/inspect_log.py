"""An evaluation as a log of Inspect, the UK AI Security Institute's tool.

`inspect view` shows such a log: scores, questions, and each rollout as a
conversation in which searches are tool calls. The format is version 2 of
`inspect_ai.log.EvalLog`, checked with inspect_ai 0.3.285; the package itself is
not needed.
"""

from __future__ import annotations

import collections
import datetime
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from stepsearch_jax import files, types

_VERSION = 2
_TASK = "stepsearch"
_SCORES = {"em": "exact_match", "f1": "answer_f1"}
# Fields of a prediction that the log has in places of its own.
_PLACED = ("id", "question", "golden_answers", "prediction", "em", "f1",
           "turns", "response")
_CARD = {"settings": dict, "metrics": dict, "sources": dict}
# Of a prediction; what an id or an answer is matters to nobody here.
_ROW = {
  "id": object, "question": str, "golden_answers": list, "prediction": object,
  "em": float, "f1": float, "turns": list, "response": str,
}


def write(evaluation: epath.Path, place: epath.Path) -> epath.Path:
  """Writes the log of an evaluation; returns its path.

  Args:
    evaluation: folder with card.json and predictions.jsonl.
    place: the file, or, if it does not end in .json, a folder in which the file
      gets a name that `inspect view` lists.

  Raises:
    UserError: the folder holds no evaluation, or a file of it is damaged.
  """
  for name in ("card.json", "predictions.jsonl"):
    types.expect((evaluation / name).exists(), "--inspect",
                 f"an evaluation with {name}", str(evaluation))
  card = files.read_object(evaluation / "card.json", _CARD)
  rows = []
  for where, row in files.read_rows(evaluation / "predictions.jsonl"):
    files.check_fields(where, row, _ROW)
    rows.append(row)
  created = datetime.datetime.fromtimestamp(
    (evaluation / "card.json").stat().mtime, datetime.UTC
  ).isoformat(timespec="seconds")
  log = make_log(card, rows, created)
  if place.suffix != ".json":
    time = created.replace(":", "-").replace("+", "-")
    place /= f"{time}_{_TASK}_{log['eval']['task_id']}.json"
  place.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(place, json.dumps(log, ensure_ascii=False) + "\n")
  return place


def make_log(
  card: dict[str, Any], rows: Sequence[dict[str, Any]], created: str
) -> dict[str, Any]:
  """Returns the log as Inspect's JSON has it.

  Args:
    card: of the evaluation (`card.make_card`).
    rows: predictions (`playing.record`), all attempts.
    created: when, as ISO 8601 with its offset from UTC.
  """
  settings = card["settings"]
  model = str(settings.get("model", "unknown"))
  name = _short_hash([card, created])
  epochs: collections.Counter[str] = collections.Counter()
  samples = []
  for row in rows:
    epochs[str(row["id"])] += 1
    samples.append(_sample(row, epochs[str(row["id"])], model))
  return {
    "version": _VERSION,
    "status": "success",
    "eval": {
      "eval_id": name, "run_id": name, "task_id": name, "created": created,
      "task": _TASK, "task_version": 0, "model": model,
      "dataset": {
        "name": str(settings.get("questions", "")), "samples": len(epochs),
        "sample_ids": list(epochs), "shuffled": False,
      },
      "config": {"epochs": max(epochs.values(), default=1)},
      "scorers": [{"name": scorer} for scorer in _SCORES.values()],
      "metadata": settings,
      **_revision(str(settings.get("commit", "unknown"))),
    },
    "plan": {"name": "rollout",
             "steps": [{"solver": "stepsearch_jax", "params": {}}]},
    "results": {
      "total_samples": len(rows), "completed_samples": len(rows),
      "scores": [_score(card, metric) for metric in _SCORES],
      "metadata": {key: card[key] for key in ("metrics", "sources", "hops")
                   if key in card},
    },
    "stats": {"started_at": "", "completed_at": created},
    "samples": samples,
  }


def _short_hash(what: Any) -> str:
  packed = json.dumps(what, sort_keys=True, default=str).encode()
  return hashlib.sha256(packed).hexdigest()[:22]


def _revision(commit: str) -> dict[str, Any]:
  if commit == "unknown":
    return {}
  return {"revision": {"type": "git", "origin": "",
                       "commit": commit.removesuffix("-dirty"),
                       "dirty": commit.endswith("-dirty")}}


def _score(card: dict[str, Any], metric: str) -> dict[str, Any]:
  """Returns the mean over all rows, and per source with its interval."""
  values = {"mean": card["metrics"][metric]}
  for source, row in card["sources"].items():
    low, high = row[f"{metric}_interval"]
    values |= {source: row[metric], f"{source}_low": low,
               f"{source}_high": high}
    if metric == "em" and "pass_at_k" in row:
      values[f"{source}_pass_at_{row['attempts']}"] = row["pass_at_k"]
  return {
    "name": metric, "scorer": _SCORES[metric], "params": {},
    "metrics": {name: {"name": name, "value": value, "params": {}}
                for name, value in values.items()},
  }


def _sample(
  row: dict[str, Any], epoch: int, model: str
) -> dict[str, Any]:
  messages = _messages(row)
  last = next((m for m in reversed(messages) if m["role"] == "assistant"),
              {"role": "assistant", "content": ""})
  stop = {
    types.StopReason.ANSWER: "stop", types.StopReason.CONTEXT: "model_length",
  }.get(row.get("stop_reason"), "unknown")
  return {
    "id": str(row["id"]), "epoch": epoch, "input": row["question"],
    "target": list(row["golden_answers"]), "messages": messages,
    "output": {
      "model": model, "completion": last["content"],
      "choices": [{"message": last, "stop_reason": stop}],
    },
    "scores": {
      metric: {"value": row[metric], "answer": row["prediction"]}
      for metric in _SCORES
    },
    "metadata": {k: v for k, v in row.items() if k not in _PLACED},
  }


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns a rollout as a conversation; searches are tool calls."""
  messages = [{"role": "user", "content": row["question"], "source": "input"}]
  for number, (turn, shown) in enumerate(_parts(row)):
    said = {"role": "assistant", "content": turn["text"], "source": "generate"}
    call = f"{row['id']}/{number}"
    searched = turn["action"] == types.Action.SEARCH
    if searched:
      said["tool_calls"] = [{
        "id": call, "type": "function", "function": "search",
        "arguments": {"query": turn["content"]},
      }]
    messages.append(said)
    if searched and shown:
      messages.append({"role": "tool", "content": shown, "function": "search",
                       "tool_call_id": call})
    elif shown.strip():
      messages.append({"role": "user", "content": shown})
  return [{"id": f"{row['id']}/m{i}", **m} for i, m in enumerate(messages)]


def _parts(row: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
  """Returns each turn with what was shown behind it.

  The response is cut where the turns' own texts stand in it. If they do not,
  as in evaluations that have no texts of turns, it is all one turn.
  """
  turns, response = row["turns"], row["response"]
  ends, starts = [], []
  for turn in turns:
    text, behind = turn.get("text"), ends[-1] if ends else 0
    begin = -1 if text is None else response.find(text, behind)
    if begin < 0:
      break
    starts.append(begin)
    ends.append(begin + len(text))
  if not turns or len(ends) < len(turns):
    whole = {"text": response, "action": "", "content": ""}
    return [(whole, "")] if response else []
  return [
    (turn, response[end:start])
    for turn, end, start in zip(
      turns, ends, [*starts[1:], len(response)], strict=True
    )
  ]
