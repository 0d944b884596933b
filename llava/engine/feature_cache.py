"""Cache of projected image features, shared by requests about the same picture.

D dim
"""

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor


class FeatureKey(NamedTuple):
    """Identifies the features of a picture."""

    adapter: str | None  # a LoRA may have its own projector
    salt: bytes  # see `Engine.add_request`
    digest: bytes  # SHA-256 of the preprocessed picture; see `sequence.placed_images`


class FeatureCache:
    """Features by key. Those that a running request still needs are kept; of the others, the most recent `n_tokens`."""

    def __init__(self, n_tokens: int):
        self.n_tokens = n_tokens  # capacity in feature vectors
        self.hits = self.misses = 0
        self._features: OrderedDict[FeatureKey, Tensor] = OrderedDict()  # least recently used first
        self._users: dict[FeatureKey, set[int]] = {}  # sequences that hold a reference

    def __contains__(self, key: FeatureKey) -> bool:
        return key in self._features

    def acquire(self, key: FeatureKey, sequence: int) -> Tensor | None:
        """Returns the features [tokens, D] and takes a reference for a sequence, or returns None if there are none."""
        features = self._features.get(key)
        if features is not None:
            users = self._users.setdefault(key, set())
            self.hits += sequence not in users
            users.add(sequence)
            self._features.move_to_end(key)
        return features

    def add(self, key: FeatureKey, features: Tensor, sequence: int) -> None:
        """Stores new features with a reference for a sequence."""
        self._features[key] = features
        self.misses += 1
        self._users.setdefault(key, set()).add(sequence)

    def release(self, keys: list[FeatureKey], sequence: int) -> None:
        """Drops the references of a sequence, then evicts unreferenced features beyond the capacity."""
        for key in keys:
            users = self._users.get(key)
            if users is not None:
                users.discard(sequence)
                if not users:
                    del self._users[key]
        total = sum(len(features) for features in self._features.values())
        for key in [key for key in self._features if key not in self._users]:
            if total <= self.n_tokens:
                return
            total -= len(self._features.pop(key))

    @property
    def n_referenced(self) -> int:
        """Number of pictures that running requests hold references to."""
        return len(self._users)

    def reset(self) -> None:
        """Forgets all features and references."""
        self._features.clear()
        self._users.clear()
