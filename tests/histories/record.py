"""Write the log of a running turnout into this folder, where all later versions replay it: ``NNNN-NAME.jsonl``.

make record ARGS="two-switches --nats nats://127.0.0.1:4222"
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import msgspec

from turnout.workers.client import connect

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Write the file and say where it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="what it shows, in words with dashes")
    parser.add_argument("--nats", default="", help="address of NATS; the turnout up of the current folder by default")
    given = parser.parse_args()
    lines = asyncio.run(recorded(given.nats))
    number = 1 + max((int(file.name[:4]) for file in HERE.glob("[0-9]*.jsonl")), default=0)
    file = HERE / f"{number:04d}-{given.name}.jsonl"
    file.write_bytes(b"".join(lines))
    print(f"wrote {len(lines)} events to {file}")  # noqa: T201  a script's answer


async def recorded(nats: str) -> list[bytes]:
    """Each event of the log as a line: the exact stored text and the digest that it has."""
    async with connect(nats) as client:
        return [
            msgspec.json.encode(
                {
                    "subject": one.subject,
                    "sequence": one.sequence,
                    "type": one.type,
                    "envelope": one.raw_envelope.decode(),
                    "body": one.body.decode(),
                    "digest": one.digest,
                }
            )
            + b"\n"
            async for one in client.log()
        ]


if __name__ == "__main__":
    main()
