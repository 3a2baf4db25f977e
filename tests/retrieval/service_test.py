"""/retrieve over a real server and the real client, good days and bad."""

import base64
import contextlib
import dataclasses
import gzip
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc

import fakes
import httpx2
import pytest
import uvicorn
from etils import epath
from starlette import applications, responses, routing

from stepsearch_jax import types
from stepsearch_jax.env import actions
from stepsearch_jax.retrieval import remote, service
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import encoder
from stepsearch_jax.tools import serve_retrieval


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
    assert service._integer(value) == theirs(int, value), value
    assert service._boolean(value) == theirs(bool, value), value


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
  with pytest.raises(service.BadRequestError, match="more than 2000 bytes"):
    service._unzipped(bomb, 2000)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1_000_000


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


def test_half_a_surrogate_pair_is_searched_as_a_replacement_character(url):
  body = b'{"queries": ["a\\ud800"], "topk": 1}'
  response = httpx2.post(f"{url}/retrieve", content=body)
  assert response.json()["result"][0][0]["contents"] == "T\nfound a\ufffd here"


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

  limits = service.ServiceLimits(waiting=10, batch=8)
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
  limits = service.ServiceLimits(timeout_seconds=0.2)
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
      serve_retrieval._bind("127.0.0.1", port)
  with serve_retrieval._bind("127.0.0.1", port) as free:
    assert free.getsockname()[1] == port


def test_the_service_encodes_as_the_index_was_encoded(tmp_path):
  embed = encoder.HashedTfidfEncoder(64)
  index_build.build_index(
    tmp_path / "i", [types.Passage("1", "Ada", "Ada wrote programs")], embed
  )
  loaded = serve_retrieval._load_encoder(epath.Path(tmp_path) / "i")
  assert loaded.settings == embed.settings
  with pytest.raises(types.UserError, match="--index: .*does not exist"):
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
  limits = service.ServiceLimits(timeout_seconds=0.1)
  app = service.make_app(fakes.FakeRetriever(delay=0.5), limits)
  with serving(app) as url:
    response = httpx2.post(f"{url}/retrieve", json={"queries": ["a"]})
  assert response.status_code == 503


def test_the_client_returns_what_the_server_found(url):
  client = remote.RemoteRetriever(url, remote.PATIENCE)
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
    with pytest.raises(types.SearchError, match="ConnectError"):
      client.search(["a"], 1)
  assert len(pauses) == 4 and 1 <= pauses[0] <= 2 <= pauses[1] <= 4
  with pytest.raises(types.SearchError, match="2 times in a row"):
    client.search(["a"], 1)
  assert len(pauses) == 4  # The open circuit asked nobody.
  now[0] = 11.0
  with pytest.raises(types.SearchError, match="ConnectError"):
    client.search(["a"], 1)


def test_the_client_does_not_repeat_a_refused_request(url):
  client = remote.RemoteRetriever(
    url, remote.PATIENCE, sleep=lambda seconds: pytest.fail()
  )
  with pytest.raises(types.SearchError, match="status 400: .*topk"):
    client.search(["a"], 99)


def test_a_refused_query_fails_alone_and_opens_no_circuit(url):
  """The server's limits: 4 queries of up to 100 characters per request."""
  spec = dataclasses.replace(remote.PATIENCE, open_after=1)
  client = remote.RemoteRetriever(
    url, spec, sleep=lambda seconds: pytest.fail()
  )
  long = "x" * 101
  for _ in range(3):
    found = client.search(["a", long, "b", "c", "d", "e"], 1)
    assert [row and row[0].text for row in found] == [
      "found a here", None, "found b here", "found c here", "found d here",
      "found e here",
    ]
    with pytest.raises(types.SearchError, match="status 400: .*101 char"):
      client.search([long, long], 1)
    with pytest.raises(types.SearchError, match="status 400"):
      client.search([str(i) for i in range(200)], 99)


@contextlib.contextmanager
def counting(answer):
  """A server that answers by a function of the queries; lists what it got."""
  asked = []

  async def retrieve(request):
    asked.append((await request.json())["queries"])
    status, content = answer(asked[-1])
    return responses.JSONResponse(content, status)

  app = applications.Starlette(routes=[
    routing.Route("/retrieve", retrieve, methods=["POST"])
  ])
  with serving(app) as url:
    yield url, asked


def test_requests_that_no_query_can_mend_are_not_repeated():
  with counting(lambda queries: (404, {})) as (url, asked):
    client = remote.RemoteRetriever(url, remote.PATIENCE)
    with pytest.raises(types.SearchError, match="status 404"):
      client.search([str(i) for i in range(200)], 1)
    assert len(asked) == 1
  with counting(lambda queries: (400, {})) as (url, asked):
    client = remote.RemoteRetriever(url, remote.PATIENCE)
    with pytest.raises(types.SearchError, match="status 400"):
      client.search([str(i) for i in range(256)], 1)
    assert len(asked) < 60  # It is not the queries' fault.


def test_a_query_that_breaks_the_server_is_found_by_halves():
  def answer(queries):
    if "bad" in queries:
      return 500, {}
    return 200, {"result": [None if q == "none" else [
      {"document": {"id": q, "contents": f"T\n{q}"}, "score": 1.0}
    ] for q in queries]}

  pauses = []
  spec = dataclasses.replace(remote.PATIENCE, retries=2, open_after=2)
  with counting(answer) as (url, asked):
    client = remote.RemoteRetriever(url, spec, sleep=pauses.append)
    names = [str(i) for i in range(30)] + ["bad", "none"]
    for _ in range(3):  # The server is well: the circuit stays closed.
      found = client.search(names, 1)
      assert [row and row[0].id for row in found] == [
        *names[:30], None, []  # null stands for no hits.
      ]
  assert len(pauses) == 2 * 3  # The halves are asked once each.


@pytest.mark.parametrize("answer", [
  [], {"result": "x"}, {"result": [["x"]]}, {"result": None},
  {"result": [[{"document": "x"}]]}, {"result": [[{"document": {}}]]},
  {"result": [[], []]}, {"result": [[{"text": 5}]]}, {}, None,
])
def test_answers_of_any_other_shape_are_failed_searches(answer):
  app = applications.Starlette(routes=[routing.Route(
    "/retrieve", lambda request: responses.JSONResponse(answer),
    methods=["POST"],
  )])
  spec = dataclasses.replace(remote.PATIENCE, retries=0)
  with serving(app) as url:
    client = remote.RemoteRetriever(url, spec)
    with pytest.raises(types.SearchError, match="/retrieve: .*Error"):
      client.search(["a"], 1)


def test_a_password_in_the_address_is_used_but_never_shown(caplog):
  caplog.set_level(logging.DEBUG)
  seen = []

  def answer(request):
    seen.append(request.headers["authorization"])
    return responses.JSONResponse({}, 403)

  app = applications.Starlette(routes=[
    routing.Route("/retrieve", answer, methods=["POST"])
  ])
  with serving(app) as url:
    secret = url.replace("http://", "http://me:pass-word@")
    client = remote.RemoteRetriever(secret, remote.PATIENCE)
    with pytest.raises(types.SearchError, match="status 403") as error:
      client.search(["a"], 1)
  assert seen == ["Basic " + base64.b64encode(b"me:pass-word").decode()]
  shown = f"{error.value} {client.describe()} {caplog.text}"
  assert "pass-word" not in shown and f"{url}/retrieve" in shown
