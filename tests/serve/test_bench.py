"""The load generator, against a server that counts connections."""

import asyncio

from llava.serve.bench import Load, bodies, run

EVENTS = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n'
RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(EVENTS) + EVENTS


async def drive(load: Load) -> tuple[list[int], list[str | None]]:
    """Returns the requests on each connection, and the error of each request."""
    connections: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(connections)
        connections.append(0)
        while head := await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b"":
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            connections[number] += 1
            await asyncio.sleep(0.02)
            writer.write(RESPONSE)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except asyncio.IncompleteReadError:  # the client has closed the connection
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        samples, _ = await run(Load(**{**vars(load), "url": f"http://127.0.0.1:{port}"}), bodies(load))
    return connections, [one.error for one in samples]


def test_each_request_in_flight_has_a_connection_which_the_next_one_uses_again() -> None:
    connections, errors = asyncio.run(drive(Load(url="", model="m", requests=12, concurrency=3)))
    assert errors == [None] * 12
    assert len(connections) == 3
    assert sum(connections) == 12


def test_requests_at_a_rate_open_connections_only_while_all_are_in_use() -> None:
    connections, errors = asyncio.run(drive(Load(url="", model="m", requests=12, rate=10.0)))
    assert errors == [None] * 12
    assert len(connections) < 12
