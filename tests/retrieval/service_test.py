"""/retrieve over a real server and the real client, good days and bad."""

import contextlib
import json
import socket
import threading
import time

import fakes
import httpx2
import pytest
import uvicorn

from stepsearch_jax.env import search_env
from stepsearch_jax.retrieval import remote, service


@contextlib.contextmanager
def serving(app):
  """Runs an ASGI app on a free port of this machine."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  server = uvicorn.Server(
    uvicorn.Config(app, "127.0.0.1", port, log_level="error")
  )
  thread = threading.Thread(target=server.run)
  thread.start()
  while not server.started:
    time.sleep(0.01)
  try:
    yield f"http://127.0.0.1:{port}"
  finally:
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url():
  limits = service.ServiceLimits(
    body_bytes=2000, queries=4, query_chars=100, topk=5
  )
  with serving(service.make_app(fakes.FakeRetriever(), limits)) as url:
    yield url


def test_requests_of_both_families_get_their_shapes(url):
  # Search-R1 and StepSearch ask with scores, verl's tool leaves them out.
  asked = {"queries": ["a", "b"], "topk": 2, "return_scores": True}
  result = httpx2.post(f"{url}/retrieve", json=asked).json()["result"]
  assert [[d["document"]["contents"] for d in row] for row in result] == [
    ["T\nfound a here"] * 2, ["T\nfound b here"] * 2
  ]
  assert all(isinstance(d["score"], float) for row in result for d in row)
  bare = httpx2.post(f"{url}/retrieve", json={"queries": ["a"]}).json()
  assert len(bare["result"][0]) == 3  # The default number of passages.
  assert bare["result"][0][0]["contents"] == "T\nfound a here"


@pytest.mark.parametrize("body, status, reason", [
  (b"{", 400, "no JSON"),
  (b"[1]", 400, "must be a JSON object"),
  (b"{}", 400, "queries must be a list of strings"),
  (b'{"queries": "a"}', 400, "queries must be a list of strings"),
  (b'{"queries": [1]}', 400, "queries must be a list of strings"),
  (b'{"queries": []}', 400, "1 to 4 strings, got 0"),
  (b'{"queries": ["a","a","a","a","a"]}', 400, "1 to 4 strings, got 5"),
  (json.dumps({"queries": ["x" * 101]}).encode(), 400, "101 characters"),
  (b'{"queries": ["a"], "topk": 6}', 400, "topk must be an integer from 1"),
  (b'{"queries": ["a"], "topk": -1}', 400, "topk must be an integer from 1"),
  (b'{"queries": ["a"], "topk": true}', 400, "topk must be an integer"),
  (b'{"queries": ["a"], "return_scores": 1}', 400, "must be a boolean"),
  (b"x" * 2001, 413, "more than 2000 bytes"),
  (b"[" * 1999, 400, "no JSON"),
])
def test_bad_requests_get_a_reason(url, body, status, reason):
  response = httpx2.post(f"{url}/retrieve", content=body)
  assert response.status_code == status
  assert reason in response.json()["error"]


def test_health_and_metrics_tell_what_happened(url):
  httpx2.post(f"{url}/retrieve", json={"queries": ["a", "b"]})
  assert httpx2.get(f"{url}/health").json()["status"] == "ok"
  text = httpx2.get(f"{url}/metrics").text
  counts = dict(
    line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"
  )
  assert float(counts["retrieve_queries_total"]) >= 2
  assert float(counts['retrieve_requests_total{status="200"}']) >= 1
  assert float(counts["retrieve_waiting"]) == 0


def test_concurrent_requests_share_searches_and_the_queue_is_bounded():
  slow = fakes.FakeRetriever(delay=0.3)
  searches = []
  search = slow.search
  slow.search = lambda queries, k: searches.append(len(queries)) or search(
    queries, k
  )
  limits = service.ServiceLimits(waiting=10, batch=8)
  statuses = []

  def ask(url, i):
    response = httpx2.post(f"{url}/retrieve", json={"queries": [f"q{i}"]},
                           timeout=30)
    statuses.append(response.status_code)
    if response.status_code == 200:
      first = response.json()["result"][0][0]
      assert first["contents"] == f"T\nfound q{i} here"

  with serving(service.make_app(slow, limits)) as url:
    threads = [threading.Thread(target=ask, args=(url, i)) for i in range(24)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert len(statuses) == 24 and set(statuses) == {200, 429}
  assert max(searches) > 1 and max(searches) <= 8
  assert sum(searches) == statuses.count(200)


def test_a_search_that_takes_too_long_is_given_up():
  limits = service.ServiceLimits(timeout_seconds=0.1)
  app = service.make_app(fakes.FakeRetriever(delay=0.5), limits)
  with serving(app) as url:
    response = httpx2.post(f"{url}/retrieve", json={"queries": ["a"]})
  assert response.status_code == 503


def test_the_client_returns_what_the_server_found(url):
  client = remote.RemoteRetriever(url)
  found = client.search(["a", "b"], 2)
  assert [[p.text for p in row] for row in found] == [
    ["found a here"] * 2, ["found b here"] * 2
  ]
  assert found[0][0].id == "a/0" and found[0][0].title == "T"


def test_the_client_retries_then_opens_its_circuit():
  pauses, now = [], [0.0]
  spec = remote.RemoteSpec(
    timeout_seconds=0.2, retries=2, backoff_seconds=1.0, open_after=2,
    open_seconds=10,
  )
  client = remote.RemoteRetriever(
    "http://127.0.0.1:9", spec, sleep=pauses.append, clock=lambda: now[0]
  )
  for _ in range(2):
    with pytest.raises(search_env.SearchError, match="ConnectError"):
      client.search(["a"], 1)
  assert len(pauses) == 4 and 1 <= pauses[0] <= 2 <= pauses[1] <= 4
  with pytest.raises(search_env.SearchError, match="2 times in a row"):
    client.search(["a"], 1)
  assert len(pauses) == 4  # The open circuit asked nobody.
  now[0] = 11.0
  with pytest.raises(search_env.SearchError, match="ConnectError"):
    client.search(["a"], 1)


def test_the_client_does_not_repeat_a_refused_request(url):
  client = remote.RemoteRetriever(url, sleep=lambda seconds: pytest.fail())
  with pytest.raises(search_env.SearchError, match="status 400: .*topk"):
    client.search(["a"], 99)
