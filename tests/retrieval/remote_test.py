"""The client of the retrieval service: patience, halving, secrets."""

import base64
import contextlib
import dataclasses
import logging

import pytest
from retrieval.servers import serving
from starlette import applications, responses, routing

from stepsearch_jax import types
from stepsearch_jax.retrieval import remote


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


@pytest.mark.parametrize("document, title, text", [
  ({"contents": "T\nfirst\nsecond"}, "T", "first\nsecond"),
  ({"contents": "T\r\nfirst"}, "T", "first"),
  ({"contents": "One line."}, "", "One line."),
  ({"title": "T", "contents": "first\nsecond"}, "T", "first\nsecond"),
  ({"title": "T", "contents": '"T"\nfirst', "text": "other"}, "T", "first"),
  ({"title": None, "contents": "\nfirst"}, "", "first"),
  ({"title": 1984, "contents": "first"}, "1984", "first"),
  ({"title": "T", "text": "first\nsecond"}, "T", "first\nsecond"),
])
def test_a_document_is_split_into_title_and_text_like_a_corpus(
  document, title, text
):
  answer = {"result": [[{"document": document}]]}
  with counting(lambda queries: (200, answer)) as (url, _):
    ((found,),) = remote.RemoteRetriever(url, remote.PATIENCE).search(["q"], 1)
  assert (found.title, found.text) == (title, text)
  assert found.id == f"{title}\n{text}"


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
