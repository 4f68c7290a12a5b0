"""What the server's listing says of its adapters."""

from collections.abc import Iterator

import grpc
import pytest

from loadtest.observer import ask_server
from server.pb.loraplex.v1 import adapters_pb2
from server.pb.loraplex.v1.adapters_pb2 import FAILED, Adapter
from tests.loadtest.conftest import ScriptedServer


class _SeveralVersions(ScriptedServer):
    def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: object
    ) -> adapters_pb2.ListAdaptersResponse:
        return adapters_pb2.ListAdaptersResponse(
            adapters=[
                Adapter(name="promoted", version="1", current=True),
                Adapter(name="promoted", version="2"),
                Adapter(name="newest", version="1"),
                Adapter(name="newest", version="2", current=True),
                Adapter(name="broken", version="1"),
                Adapter(name="broken", version="2", state=FAILED, current=True),
            ]
        )


@pytest.fixture
def address() -> Iterator[str]:
    server = _SeveralVersions(lambda server, requests: None)
    yield server.address
    server.die()


async def test_a_name_means_its_current_version_if_that_can_be_served(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        facts = await ask_server(channel, address)
    assert facts.versions == {"promoted": "1", "newest": "2"}
