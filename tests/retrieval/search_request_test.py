"""What the retrieval service reads from a request, and what it refuses."""

import gzip
import json
import tracemalloc

import httpx2
import pytest

from stepsearch_jax.retrieval import search_request
from stepsearch_jax.serving import errors, http


@pytest.mark.parametrize("body, status, reason", [
  (b"{", 400, "no JSON"),
  (b"[1]", 400, "must be a JSON object"),
  (b"{}", 400, "queries must be a list of strings"),
  (b'{"queries": "a"}', 400, "queries must be a list of strings"),
  (b'{"queries": [1]}', 400, "queries must be a list of strings"),
  (b'{"queries": ["a","a","a","a","a"]}', 400, "up to 4 strings, got 5"),
  (b'{"queries": null}', 400, "queries must be a list of strings"),
  (json.dumps({"queries": ["x" * 101]}).encode(), 400, "101 characters"),
  (b'{"queries": ["a"], "topk": 6}', 400, "topk must be an integer from 1"),
  (b'{"queries": ["a"], "topk": -1}', 400, "topk must be an integer from 1"),
  (b'{"queries": ["a"], "topk": 0}', 400, "topk must be an integer from 1"),
  (b'{"queries": ["a"], "topk": "2.5"}', 400, "topk must be an integer"),
  (b'{"queries": ["a"], "topk": "many"}', 400, "topk must be an integer"),
  (b'{"queries": ["a"], "topk": [1]}', 400, "topk must be an integer"),
  (b'{"queries": ["a"], "return_scores": 2}', 400, "must be a boolean"),
  (b'{"queries": ["a"], "return_scores": "maybe"}', 400, "must be a boolean"),
  (b'{"queries": ["a"], "topk": 2.5}', 400, "topk must be an integer"),
  (b'{"queries": ["a"], "topk": 1e400}', 400, "topk must be an integer"),
  (b'{"topk": ' + b"9" * 1900 + b', "queries": ["a"]}', 400, "topk must be"),
  (b"x" * 2001, 413, "more than 2000 bytes"),
  (b"[" * 1999, 400, "no JSON"),
  (b"\xff\xfe{", 400, "no JSON"),
])
def test_bad_requests_get_a_reason(url, body, status, reason):
  response = httpx2.post(f"{url}/retrieve", content=body)
  assert response.status_code == status
  assert reason in response.json()["error"]


@pytest.mark.parametrize("fields, count, scored", [
  ({"topk": "1", "return_scores": "true"}, 1, True),
  ({"topk": 2.0, "return_scores": None}, 2, False),
  ({"topk": " 2 ", "return_scores": 1}, 2, True),
  ({"topk": True, "return_scores": "Off"}, 1, False),
  ({"topk": None, "return_scores": 0}, 3, False),
])
def test_fields_are_read_as_typed_servers_read_them(
  url, fields, count, scored
):
  response = httpx2.post(f"{url}/retrieve", json={"queries": ["a"], **fields})
  (found,) = response.json()["result"]
  assert len(found) == count and ("score" in found[0]) == scored


def test_what_typed_servers_read_is_what_pydantic_reads():
  pydantic = pytest.importorskip("pydantic")
  values = ["1", "1.0", " 7 ", "", "x", "2.5", 3, 3.0, 2.5, True, False, [], {},
            "true", "TRUE", "no", "off", "t", "n", 0, 1, 2, 1.0, "0", "yes"]

  def theirs(kind, value):
    try:
      return pydantic.TypeAdapter(kind).validate_json(json.dumps(value))
    except pydantic.ValidationError:
      return None

  for value in values:
    assert search_request._integer(value) == theirs(int, value), value
    assert search_request._boolean(value) == theirs(bool, value), value


def test_gzipped_bodies_are_read_within_the_limit(url):
  def send(body, coding="gzip"):
    response = httpx2.post(
      f"{url}/retrieve", content=body, headers={"content-encoding": coding}
    )
    return response.status_code, response.json()

  plain = json.dumps({"queries": ["a"], "topk": 1}).encode()
  status, answer = send(gzip.compress(plain))
  assert status == 200
  assert answer["result"][0][0]["contents"] == "T\nfound a here"
  assert send(plain, "identity")[0] == 200
  assert send(plain)[0] == 400
  assert send(gzip.compress(plain)[:-9])[0] == 400
  assert send(gzip.compress(b" " * 10_000))[0] == 413
  assert send(plain, "br")[0] == 415


def test_a_gzip_bomb_is_not_unpacked():
  bomb = gzip.compress(bytes(50_000_000))
  tracemalloc.start()
  with pytest.raises(errors.BadRequestError, match="more than 2000 bytes"):
    http.unzipped(bomb, 2000)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1_000_000


def test_half_a_surrogate_pair_is_searched_as_a_replacement_character(url):
  body = b'{"queries": ["a\\ud800"], "topk": 1}'
  response = httpx2.post(f"{url}/retrieve", content=body)
  assert response.json()["result"][0][0]["contents"] == "T\nfound a\ufffd here"
