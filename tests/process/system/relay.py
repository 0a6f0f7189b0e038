"""A relay of TCP connections that can be cut: what is sent then disappears, and nobody hears of it.

As a network does it. Connections that are open stay open; new ones are taken and lead nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib


class Relay:
    """Between one gateway and NATS.

    Args:
        port: where it listens, on 127.0.0.1.
        target: port that it leads to.
    """

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self._target = target
        self._whole = asyncio.Event()
        self._whole.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._taken, "127.0.0.1", self.port)

    def cut(self) -> None:
        """Pass nothing on from now."""
        self._whole.clear()

    def mend(self) -> None:
        """Pass on again. What was held back before comes late, or finds its connection closed."""
        self._whole.set()

    async def close(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._join(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await self._whole.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass(reader, back))
                    both.create_task(self._pass(there, writer))
            finally:
                back.close()
        writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
