"""Whole recorded runs of the released loop with a scripted policy."""

import json

import numpy as np
from reference import released_loop

from stepsearch_jax import types
from stepsearch_jax.env import prompts, search_env
from stepsearch_jax.models import tokenizer as tokenizer_lib


class RecordedRetriever:
  """The search results of one recorded case."""

  def __init__(self, results):
    self._results = results

  def search(self, queries, k):
    found = []
    for query in queries:
      contents = [d["document"]["contents"] for d in self._results[query]]
      pairs = [text.split("\n", 1) for text in contents]
      found.append([types.Passage("", *pair) for pair in pairs])
    return found


def test_tensors_and_calls_equal_the_released_loop(shared):
  golden = shared / "golden"
  cases = json.loads((golden / "protocol/protocol_cases.json").read_text())
  tokenizer = tokenizer_lib.load(
    str(golden / "tokenizer_smollm2/tokenizer.json")
  )
  assert len(cases["loop"]) >= 10
  for case in cases["loop"]:
    limits = dict(case["config"])
    env = search_env.SearchEnv(
      prompts.TEMPLATES["stepsearch"], max_turns=limits.pop("max_turns"),
      topk=3, sanitize=False,
    )
    expected = case["expected"]
    calls = iter(expected["calls"])

    pad = case["pad_token_id"]

    def generate(rows, ids, mask, positions, calls=calls, name=case["id"],
                 pad=pad):
      call = next(calls)
      assert rows.tolist() == call["rows"], name
      np.testing.assert_array_equal(ids, call["input_ids"], name)
      np.testing.assert_array_equal(positions, call["position_ids"], name)
      np.testing.assert_array_equal(mask, np.asarray(ids) != pad, name)
      return call["generated"]

    loop = released_loop.ReleasedLoop(
      env, RecordedRetriever(case["search_results"]), tokenizer, pad,
      released_loop.LoopLimits(**limits),
    )
    width = case["initial_length"]
    padded = [
      [pad] * (width - len(ids)) + ids for ids in case["prompt_ids"]
    ]
    result = loop.run(np.asarray(padded), generate)
    assert next(calls, None) is None, case["id"]
    for name, want in {**expected["tensors"], **expected["meta_info"]}.items():
      np.testing.assert_array_equal(getattr(result, name), want,
                                    f"{case['id']} {name}")
