"""The `released` preset against recorded outputs of the released code."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from reference import released_rows

from stepsearch_jax.rewards import released, step_rewards, text_match

RELEASED = step_rewards.RewardSpec.released()
FILES = ("edge", "musique", "searchr1")


def rows(shared, name):
  path = shared / f"golden/reward/reward_cases_{name}.jsonl"
  with path.open() as file:
    return [json.loads(line) for line in file]


def check(scores, expected):
  assert scores.score == pytest.approx(expected["score"], abs=1e-6)
  assert scores.answer_correct == pytest.approx(expected["answer_correct"])
  assert scores.search_key_score == pytest.approx(
    expected["search_key_score"], abs=1e-6
  )
  for name in ("step_scores", "information_gains", "redundancy_penalty"):
    ours, theirs = getattr(scores, name), expected.get(name)
    if name in expected:
      assert (ours is None) == (theirs is None)
      np.testing.assert_allclose(ours or [], theirs or [], atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_scores_parts_and_errors_equal_golden(shared, name):
  for case in rows(shared, name):
    if "expected_error" in case:
      with pytest.raises(step_rewards.RewardError) as caught:
        released.score_case(RELEASED, case)
      assert caught.value.kind == case["expected_error"], case["id"]
    else:
      check(released.score_case(RELEASED, case), case["expected"])


@pytest.mark.parametrize("name", FILES)
def test_all_ablation_switches_equal_golden(shared, name):
  for case in rows(shared, name):
    for ablation in case.get("ablations", []):
      spec = dataclasses.replace(RELEASED, **ablation["switches"])
      if "expected_error" in ablation:
        with pytest.raises(step_rewards.RewardError):
          released.score_case(spec, case)
      else:
        check(released.score_case(spec, case),
              ablation.get("expected", ablation))


def test_token_placement_drift_and_overwrite_equal_golden(shared):
  tokenizer = tokenizers.Tokenizer.from_file(
    str(shared / "golden/tokenizer_smollm2/tokenizer.json")
  )
  path = shared / "golden/token_reward/token_reward_cases.json"
  compared = drifted = 0
  for case in json.loads(path.read_text())["cases"]:

    def encode(text, bos=case["encode_adds_bos"]):
      return ([1] if bos else []) + tokenizer.encode(text).ids

    def decode(ids):
      return tokenizer.decode(list(ids), skip_special_tokens=False)

    # Masks come from ids != pad, so pads inside a text shift everything.
    pad = case["pad_token_id"]
    prompt = [pad] * case["left_pad"] + case["prompt_ids"]
    response = case["response_ids"] + [pad] * case["right_pad"]
    valid_prompt = sum(i != pad for i in prompt)
    valid = sum(i != pad for i in response)
    assert valid == case["valid_response_length"], case["id"]
    full = prompt[len(prompt) - valid_prompt :] + response[:valid]
    row = {**case, "response": released.scored_text(decode(full))}
    spec = dataclasses.replace(RELEASED, **case["switches"])
    scores = released.score_case(spec, row)
    positions = released.step_positions(response[:valid], encode, decode)
    arguments = (
      scores, positions, len(response), valid, case["step_reward_scale"]
    )
    expected = case.get("expected")
    if expected is None:
      with pytest.raises(IndexError) as caught:
        released_rows.reward_row(*arguments)
      assert str(caught.value) == case["expected_error_message"]
      continue
    want = np.zeros(expected["reward_length"], np.float32)
    for index, value in expected["reward_sparse"].items():
      want[int(index)] = value
    np.testing.assert_allclose(
      released_rows.reward_row(*arguments), want, atol=1e-6, err_msg=case["id"]
    )
    compared += 1
    true = case["diagnostics"].get("true_token_positions")
    drifted += bool(true) and positions != true
  assert compared > 30 and drifted > 10


def test_evaluation_answers_em_and_f1_equal_golden(shared):
  data = json.loads((shared / "golden/eval/eval_cases.json").read_text())
  for case in data["cases"]:
    golds = case["ground_truth"]
    golds = [golds] if isinstance(golds, str) else golds
    answer = released.evaluated_answer(case["response"])
    expected = case["expected"]
    assert answer == expected["extracted"], case["id"]
    em = released.evaluated_match(answer, golds)
    assert em == expected["em"], case["id"]
    if expected["f1"] is not None:
      assert text_match.f1(answer, golds) == pytest.approx(expected["f1"])
