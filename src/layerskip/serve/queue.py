"""Who waits for a row: a bounded queue that serves clients in turn, each in the order of its own requests."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items by client. Who has just been served goes behind the others, however many it has waiting."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._by_client: OrderedDict[str, deque[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, client: str, item: Item) -> None:
        """Queue an item behind the client's others; the caller has looked whether there is room."""
        self._by_client.setdefault(client, deque()).append(item)
        self._count += 1

    def take(self) -> Item | None:
        """The item whose turn it is; None where nobody waits."""
        if not self._by_client:
            return None
        client, own = next(iter(self._by_client.items()))
        item = own.popleft()
        self._count -= 1
        if own:
            self._by_client.move_to_end(client)
        else:
            del self._by_client[client]
        return item

    def drop(self, client: str, item: Item) -> bool:
        """Remove an item that waits; say whether it did."""
        own = self._by_client.get(client)
        if own is None or item not in own:
            return False
        own.remove(item)
        self._count -= 1
        if not own:
            del self._by_client[client]
        return True

    def items(self) -> list[tuple[str, Item]]:
        return [(client, item) for client, own in self._by_client.items() for item in own]
