# SPDX-License-Identifier: Apache-2.0
"""Server-sent events, read strictly: a line that is none is an error and not skipped, as it would hide lost tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator

FIELDS = ("event", "id", "retry")


class ResponseError(Exception):
    """A response that cannot be measured. kind: one word, to count by."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


async def events(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The data of each event. Raises ResponseError for a line that is no part of one."""
    data: list[str] = []
    async for line in lines:
        if not line:
            if data:
                yield "\n".join(data)
            data = []
            continue
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        elif field and field not in FIELDS:  # no field at all: a comment, which keeps a connection alive
            raise ResponseError("bad_sse", f"not a line of server-sent events: {line[:80]!r}")
    if data:
        yield "\n".join(data)
