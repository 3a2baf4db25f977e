"""The Model Context Protocol, spoken to the command as a client does."""

import json
import os
import subprocess
import sys

import fakes
import pytest

from stepsearch_jax import types
from stepsearch_jax.retrieval import search_request, search_tool
from stepsearch_jax.retrieval.index import build as index_build
from stepsearch_jax.retrieval.index import encoder
from stepsearch_jax.serving import mcp

KEY = "io.modelcontextprotocol/"
META = {KEY + "protocolVersion": "2026-07-28",
        KEY + "clientInfo": {"name": "test", "version": "1"},
        KEY + "clientCapabilities": {}}
LIMITS = search_request.ServiceLimits(query_chars=100, topk=5)


@pytest.fixture
def server():
  tool = search_tool.search_tool(fakes.FakeRetriever(), LIMITS)
  return mcp.ToolServer("stepsearch", "0", [tool])


def request(method, number=1, **params):
  return json.dumps({"jsonrpc": "2.0", "id": number, "method": method,
                     "params": params})


def call(server, arguments, **more):
  answer = server.answer(request(
    "tools/call", name="search", arguments=arguments, **more
  ))
  return answer["result"]


def test_a_client_with_a_handshake_is_served(server):
  for asked, agreed in (("2025-11-25", "2025-11-25"),
                        ("2024-11-05", "2024-11-05"),
                        ("2099-01-01", "2025-11-25"),
                        ("2026-07-28", "2025-11-25"), (None, "2025-11-25")):
    opened = server.answer(request(
      "initialize", protocolVersion=asked, capabilities={},
      clientInfo={"name": "test", "version": "1"},
    ))
    assert (opened["jsonrpc"], opened["id"]) == ("2.0", 1)
    assert opened["result"] == {
      "protocolVersion": agreed, "capabilities": {"tools": {}},
      "serverInfo": {"name": "stepsearch", "version": "0"},
    }
  assert server.answer(
    '{"jsonrpc": "2.0", "method": "notifications/initialized"}'
  ) is None
  assert server.answer(request("ping", "a")) == {
    "jsonrpc": "2.0", "id": "a", "result": {},
  }


def test_a_client_without_one_finds_out_what_there_is(server):
  found = server.answer(request("server/discover", _meta=META))["result"]
  assert found["supportedVersions"][0] == "2026-07-28"
  assert found["capabilities"] == {"tools": {}}
  listed = server.answer(request("tools/list", _meta=META))["result"]
  for result in (found, listed):
    assert result["resultType"] == "complete"
    assert result["cacheScope"] == "public" and result["ttlMs"] >= 0
    assert result["_meta"][KEY + "serverInfo"]["name"] == "stepsearch"
  (tool,) = listed["tools"]
  assert tool["name"] == "search"
  assert tool["inputSchema"]["required"] == ["query"]
  assert set(tool["inputSchema"]["properties"]) == {"query", "topk"}
  assert call(server, {"query": "a"}, _meta=META)["resultType"] == "complete"


def test_a_version_that_nobody_speaks_is_refused_with_those_there_are(server):
  for version in ("1900-01-01", 3, None):
    refused = server.answer(request(
      "tools/list", _meta=META | {KEY + "protocolVersion": version}
    ))
    assert refused["error"]["code"] == -32022
    assert refused["error"]["data"]["requested"] == version
    assert "2026-07-28" in refused["error"]["data"]["supported"]


def test_a_search_gives_text_and_the_same_as_an_object(server):
  result = call(server, {"query": "Ada", "topk": 2})
  assert result["isError"] is False
  assert result["structuredContent"] == {"passages": [
    {"id": f"Ada/{i}", "title": "T", "text": "found Ada here", "score": 0.0}
    for i in range(2)
  ]}
  (content,) = result["content"]
  assert content == {"type": "text", "text": (
    "Doc 1 (Title: T)\nfound Ada here\n\nDoc 2 (Title: T)\nfound Ada here"
  )}
  assert len(call(server, {"query": "Ada"})["structuredContent"]["passages"]
             ) == LIMITS.default_topk


@pytest.mark.parametrize("arguments, reason", [
  ({}, "query must be a string, got None"),
  ({"query": ["a"]}, "query must be a string"),
  ({"query": "x" * 101}, "101 characters, the limit is 100"),
  ({"query": "a", "topk": 6}, "topk must be an integer from 1 to 5, got 6"),
  ({"query": "a", "topk": 0}, "topk must be"),
  ({"query": "a", "k": 1}, "expected query and topk only, got 'k'"),
])
def test_arguments_that_a_model_can_mend_are_told_to_it(
  server, arguments, reason
):
  result = call(server, arguments)
  assert result["isError"] is True and "structuredContent" not in result
  assert reason in result["content"][0]["text"]


@pytest.mark.parametrize("line, number, code", [
  ("{", None, -32700),
  ("[" * 100_000, None, -32700),
  ("[]", None, -32600),
  ('{"id": 1, "method": "ping"}', None, -32600),
  ('{"jsonrpc": "2.0", "id": null, "method": "ping"}', None, -32600),
  ('{"jsonrpc": "2.0", "id": true, "method": "ping"}', None, -32600),
  ('{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": []}', 1, -32602),
  (request("resources/list", 7), 7, -32601),
  (request("tools/call", 7, name="rm"), 7, -32602),
  (request("tools/call", 7, name=["search"]), 7, -32602),
  (request("tools/call", 7, name="search", arguments="a"), 7, -32602),
])
def test_messages_that_mean_nothing_are_errors_of_the_protocol(
  server, line, number, code
):
  answer = server.answer(line)
  assert (answer["id"], answer["error"]["code"]) == (number, code)
  assert answer["error"]["message"] and "result" not in answer


def test_a_search_that_fails_ends_no_server():
  class Picky(fakes.FakeRetriever):
    def search(self, queries, k):
      if queries == ["lost"]:
        return [None]
      if queries == ["nan"]:
        return [[types.Passage("1", "T", "x", float("nan"))]]
      if queries == ["bad"]:
        raise RuntimeError("secret detail")
      return super().search(queries, k)

  tool = search_tool.search_tool(Picky(), LIMITS)
  server = mcp.ToolServer("stepsearch", "0", [tool])
  for query, kind in (("lost", "SearchError"), ("nan", "SearchError"),
                      ("bad", "RuntimeError")):
    result = call(server, {"query": query})
    assert result["isError"] is True
    assert result["content"][0]["text"] == f"search failed: {kind}"
  assert call(server, {"query": "a"})["isError"] is False


def test_the_command_speaks_nothing_else_on_standard_output(tmp_path):
  passages = [types.Passage("1", "Ada", "Ada wrote\u2028programs"),
              types.Passage("2", "Bergen", "Bergen has rain")]
  index_build.build_index(
    tmp_path / "index", passages, encoder.HashedTfidfEncoder(64)
  )
  lines = [
    request("initialize", 1, protocolVersion="2025-06-18", capabilities={}),
    '{"jsonrpc": "2.0", "method": "notifications/initialized"}', "",
    request("tools/list", 2),
    request("tools/call", 3, name="search",
            arguments={"query": "Ada programs", "topk": 1}),
    "nonsense",
    request("tools/call", 4, name="search", arguments={"query": "B\u00f8rgen"}),
  ]
  done = subprocess.run(
    [sys.executable, "-m", "stepsearch_jax", "serve", "--mcp",
     f"--index={tmp_path}/index"],
    input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=120,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr
  answers = [json.loads(line) for line in done.stdout.splitlines()]
  assert [answer["id"] for answer in answers] == [1, 2, 3, None, 4]
  assert answers[0]["result"]["protocolVersion"] == "2025-06-18"
  (found,) = answers[2]["result"]["structuredContent"]["passages"]
  assert (found["id"], found["text"]) == ("1", passages[0].text)
  assert found["score"] > 0
