"""A retrieval service that the tests of service and client share."""

import fakes
import pytest
from retrieval.servers import serving

from stepsearch_jax.retrieval import search_request, service


@pytest.fixture(scope="module")
def url():
  limits = search_request.ServiceLimits(
    body_bytes=2000, queries=4, query_chars=100, topk=5
  )
  with serving(service.make_app(fakes.FakeRetriever(), limits)) as url:
    yield url
