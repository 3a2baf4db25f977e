"""/retrieve over a real server and the real client, good days and bad."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import fakes
import httpx2
import pytest
from etils import epath
from retrieval.servers import serving

from stepsearch_jax import types
from stepsearch_jax.env import actions
from stepsearch_jax.retrieval import search_request, service
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import encoder
from stepsearch_jax.serving import listening
from stepsearch_jax.tools import serve_retrieval


def released_observations(url, predictions, active, topk):
  """What the released loop does with a turn: one request for the whole batch.

  The request is sent even when no row searches; contents are split at their
  first line end; errors are not looked at.
  """
  asked = []
  for text, on in zip(predictions, active, strict=True):
    action = actions.parse(text)
    if on and action.action == "search":
      asked.append(action.content)
  payload = {"queries": asked, "topk": topk, "return_scores": True}
  found = iter(httpx2.post(f"{url}/retrieve", json=payload).json()["result"])
  seen = []
  for text, on in zip(predictions, active, strict=True):
    seen.append(None)
    if on and actions.parse(text).action == "search":
      lines = ""
      for i, item in enumerate(next(found), 1):
        title, *rest = item["document"]["contents"].split("\n")
        lines += f"Doc {i}<## Title: {title} ##> " + "\n".join(rest) + "\n"
      seen[-1] = f"\n\n<information> {lines.strip()} </information>\n\n"
  assert not list(found)
  return seen


def test_released_client_sees_what_the_released_server_showed_it(shared):
  path = shared / "golden/protocol/protocol_cases.json"
  cases = [
    case for case in json.loads(path.read_text())["execute_predictions"]
    if "expected" in case and case["do_search"] and not case["is_last"]
  ]
  known = {}

  class Golden:
    def search(self, queries, k):
      return [known.get(query, known[None])[:k] for query in queries]

  compared = 0
  with serving(service.make_app(Golden())) as url:
    for case in cases:
      results = {**case["results_by_query"], None: case["default_result"]}
      for query, documents in results.items():
        parts = [d["document"]["contents"].partition("\n") for d in documents]
        known[query] = [
          types.Passage(str(i), title, text)
          for i, (title, _, text) in enumerate(parts)
        ]
      seen = released_observations(
        url, case["predictions"], case["active_mask"], topk=3
      )
      for ours, expected in zip(seen, case["expected"]["next_obs"],
                                strict=True):
        if ours is not None:
          assert ours == expected, case["id"]
          compared += 1
  assert compared >= 8
  assert {"exec_case:all_inactive", "exec_case:answer_mid"} <= {
    case["id"] for case in cases
  }  # Turns without a search: the client sends no queries.


def test_verl_tool_gets_the_documents_that_it_formats(url):
  response = httpx2.post(
    f"{url}/retrieve",
    headers={"Content-Type": "application/json", "Accept": "application/json"},
    json={"queries": ["a", "b"], "topk": 2, "return_scores": True},
  )
  response.raise_for_status()
  assert response.headers["content-type"] == "application/json"
  result = response.json()["result"]
  assert [len(row) for row in result] == [2, 2]
  formatted = [
    f"Doc {i} (Title: {title})\n{text}"
    for row in result
    for i, (title, text) in enumerate(
      [d["document"]["contents"].split("\n") for d in row], 1
    )
  ]
  assert formatted == [
    "Doc 1 (Title: T)\nfound a here", "Doc 2 (Title: T)\nfound a here",
    "Doc 1 (Title: T)\nfound b here", "Doc 2 (Title: T)\nfound b here",
  ]
  assert all(isinstance(d["score"], float) for row in result for d in row)


def test_without_scores_documents_are_bare(url):
  for asked in ({"queries": ["a"]}, {"queries": ["a"], "topk": None}):
    bare = httpx2.post(f"{url}/retrieve", json=asked).json()
    assert len(bare["result"][0]) == 3  # The default number of passages.
    assert bare["result"][0][0]["contents"] == "T\nfound a here"
  assert httpx2.post(f"{url}/retrieve", json={"queries": []}).json() == {
    "result": []
  }


def test_a_score_without_json_is_an_error_that_is_counted():
  class Lost(fakes.FakeRetriever):
    def search(self, queries, k):
      nan = types.Passage("1", "T", "x", float("nan"))
      return [None if q == "bad" else [nan] for q in queries]

  asked = {"queries": ["a"], "return_scores": True}
  with serving(service.make_app(Lost())) as url:
    assert httpx2.post(f"{url}/retrieve", json=asked).status_code == 500
    failed = httpx2.post(f"{url}/retrieve", json={"queries": ["b", "bad"]})
    assert failed.json() == {"error": "the search failed: SearchError"}
    text = httpx2.get(f"{url}/metrics").text
  assert 'retrieve_requests_total{status="500"} 2.0' in text
  assert 'status="200"' not in text
  assert "retrieve_queries_total 0.0" in text


def test_wrong_methods_and_paths_are_refused(url):
  assert httpx2.get(f"{url}/retrieve").status_code == 405
  assert httpx2.post(f"{url}/other", json={}).status_code == 404


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
  searches, full = [], threading.Event()

  class Waits(fakes.FakeRetriever):
    def search(self, queries, k):
      searches.append(len(queries))
      full.wait(30)
      return super().search(queries, k)

  limits = search_request.ServiceLimits(waiting=10, batch=8)
  statuses = []

  def ask(url, i):
    response = httpx2.post(f"{url}/retrieve", json={"queries": [f"q{i}"]},
                           timeout=30)
    statuses.append(response.status_code)
    if response.status_code == 200:
      first = response.json()["result"][0][0]
      assert first["contents"] == f"T\nfound q{i} here"

  with serving(service.make_app(Waits(), limits)) as url:
    threads = [threading.Thread(target=ask, args=(url, i)) for i in range(24)]
    for thread in threads:
      thread.start()
    while len(statuses) < 24 - 8 - 10:  # A batch is searched, the queue full.
      time.sleep(0.01)
    full.set()
    for thread in threads:
      thread.join()
  assert len(statuses) == 24 and set(statuses) == {200, 429}
  assert max(searches) > 1 and max(searches) <= 8
  assert sum(searches) == statuses.count(200)


def test_a_query_that_fails_does_not_fail_the_requests_beside_it():
  class Picky(fakes.FakeRetriever):
    def search(self, queries, k):
      found = super().search(queries, k)
      if "bad" in queries:
        raise RuntimeError("secret detail")
      return found

  answers = {}
  names = ["slow", "a", "bad", "b"]

  def ask(url, name):
    answers[name] = httpx2.post(
      f"{url}/retrieve", json={"queries": [name]}, timeout=30
    )

  with serving(service.make_app(Picky(delay=0.3))) as url:
    threads = [threading.Thread(target=ask, args=(url, n)) for n in names]
    for thread in threads:
      thread.start()
      time.sleep(0.05)  # The others wait together behind the slow one.
    for thread in threads:
      thread.join()
  assert [answers[name].status_code for name in names] == [200, 200, 500, 200]
  assert answers["bad"].json() == {"error": "the search failed: RuntimeError"}


def test_a_request_that_never_ends_is_given_up():
  limits = search_request.ServiceLimits(timeout_seconds=0.2)
  with serving(service.make_app(fakes.FakeRetriever(), limits)) as url:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
      client.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\n"
                     b"Content-Length: 100\r\n\r\n{")
      assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_requests_in_flight_are_answered_before_the_server_stops():
  codes = []

  def ask(url):
    codes.append(httpx2.post(
      f"{url}/retrieve", json={"queries": ["a"]}, timeout=30
    ).status_code)

  begun = threading.Event()

  class Slow(fakes.FakeRetriever):
    def search(self, queries, k):
      begun.set()
      return super().search(queries, k)

  with serving(service.make_app(Slow(delay=0.5))) as url:
    thread = threading.Thread(target=ask, args=(url,))
    thread.start()
    assert begun.wait(30)
  thread.join()
  assert codes == [200]
  with pytest.raises(httpx2.ConnectError):
    httpx2.get(f"{url}/health")


def test_a_port_in_use_is_said_before_the_index_is_opened(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(types.UserError, match=f"--port={port}: .*in use"):
      listening.bind("127.0.0.1", port)
  with listening.bind("127.0.0.1", port) as free:
    assert free.getsockname()[1] == port


def test_the_service_encodes_as_the_index_was_encoded(tmp_path):
  embed = encoder.HashedTfidfEncoder(64)
  index_build.build_index(
    tmp_path / "i", [types.Passage("1", "Ada", "Ada wrote programs")], embed
  )
  loaded = serve_retrieval._load_encoder(epath.Path(tmp_path) / "i")
  assert loaded.settings == embed.settings
  with pytest.raises(types.UserError, match="--index: .*j is no index"):
    serve_retrieval._load_encoder(epath.Path(tmp_path) / "j")


@pytest.mark.slow
def test_command_listens_on_this_machine_only_and_stops_when_told(tmp_path):
  index_build.build_index(
    tmp_path / "index", [types.Passage("1", "Ada", "Ada wrote programs")],
    encoder.HashedTfidfEncoder(64),
  )
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  process = subprocess.Popen(
    [sys.executable, "-m", "stepsearch_jax.tools.serve_retrieval",
     f"--index={tmp_path}/index",
     f"--port={port}", "--queries=2"],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  url = f"http://127.0.0.1:{port}"
  try:
    for _ in range(600):
      with contextlib.suppress(httpx2.ConnectError):
        if httpx2.get(f"{url}/health").status_code == 200:
          break
      assert process.poll() is None
      time.sleep(0.1)
    found = httpx2.post(f"{url}/retrieve", json={"queries": ["Ada"]}).json()
    assert found["result"][0][0]["id"] == "1"
    many = httpx2.post(f"{url}/retrieve", json={"queries": ["a"] * 3})
    assert many.status_code == 400
    with pytest.raises(OSError):  # Linux answers all of 127/8 on 0.0.0.0.
      socket.create_connection(("127.0.0.2", port), timeout=5)
  finally:
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=30)
  assert code in (0, -signal.SIGTERM)


def test_a_search_that_takes_too_long_is_given_up():
  limits = search_request.ServiceLimits(timeout_seconds=0.1)
  app = service.make_app(fakes.FakeRetriever(delay=0.5), limits)
  with serving(app) as url:
    response = httpx2.post(f"{url}/retrieve", json={"queries": ["a"]})
  assert response.status_code == 503
