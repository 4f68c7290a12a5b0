"""What the server's listing says of its adapters."""

from collections.abc import Iterator

import grpc
import pytest

from loadtest.observer import ask_server
from server.pb.loraplex.v1 import adapters_pb2
from server.pb.loraplex.v1.adapters_pb2 import DEVICE, DISK, FAILED, HOST, Adapter
from tests.loadtest.conftest import ScriptedServer


class _SeveralVersions(ScriptedServer):
    def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: object
    ) -> adapters_pb2.ListAdaptersResponse:
        return adapters_pb2.ListAdaptersResponse(
            adapters=[
                Adapter(name="promoted", version="1", tier=DEVICE, current=True),
                Adapter(name="promoted", version="2", tier=DISK),
                Adapter(name="newest", version="1", tier=DISK),
                Adapter(name="newest", version="2", tier=HOST, current=True),
                Adapter(name="broken", version="1", tier=HOST),
                Adapter(name="broken", version="2", tier=DISK, state=FAILED, current=True),
            ]
        )


@pytest.fixture
def address() -> Iterator[str]:
    server = _SeveralVersions(lambda server, requests: None)
    yield server.address
    server.die()


async def test_a_name_is_where_its_current_version_is(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        facts = await ask_server(channel, address)
    assert facts.versions == {"promoted": "1", "newest": "2"}
    assert facts.tiers == {
        "promoted": "device",
        "promoted@1": "device",
        "promoted@2": "disk",
        "newest": "host",
        "newest@1": "disk",
        "newest@2": "host",
        "broken@1": "host",
    }
