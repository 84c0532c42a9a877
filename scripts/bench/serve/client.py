"""The client of the benchmark: the same bytes again and again, so that it takes little of the processor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import grpc

Ask = Callable[[], Awaitable[bytes]]

INFER = "/inference.GRPCInferenceService/ModelInfer"


async def over_http(port: int, path: str, body: bytes, stack: AsyncExitStack) -> Ask:
    """Open a connection; each call sends the body once and returns that of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stack.callback(writer.close)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    request = f"{head}\r\n".encode() + body

    async def ask() -> bytes:
        writer.write(request)
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        if headers.get("transfer-encoding") == "chunked":
            answer = b""
            while size := int(await reader.readline(), 16):
                answer += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            answer = await reader.readexactly(int(headers["content-length"]))
        if " 200 " not in status:
            raise RuntimeError(f"{path}: {status}: {answer[:300]!r}")
        return answer

    return ask


async def over_grpc(port: int, request: bytes, stack: AsyncExitStack) -> Ask:
    """Open a channel; each call sends the message once and returns that of the answer."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options))
    call = channel.unary_unary(INFER)  # without a serializer: messages are bytes
    return lambda: call(request)


async def ask_many(asks: list[Ask], requests: int) -> list[float]:
    """Send requests, always one by each of `asks`, and return the seconds that each took."""
    seconds: list[float] = []
    left = iter(range(requests))

    async def repeat(ask: Ask) -> None:
        for _ in left:
            begun = time.perf_counter()
            await ask()
            seconds.append(time.perf_counter() - begun)

    await asyncio.gather(*map(repeat, asks))
    return seconds
