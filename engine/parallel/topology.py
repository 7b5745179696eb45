"""Who is where: ranks in a grid of pipeline stages and tensor shards."""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """`tensor` shards of each layer, `pipeline` stages of layers, as rank `rank` sees them.

    Rank = stage * tensor + shard. Rank 0 is the worker's own process.
    """

    tensor: int = 1
    pipeline: int = 1
    rank: int = 0

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline

    @property
    def stage(self) -> int:
        """Which layers it has."""
        return self.rank // self.tensor

    @property
    def shard(self) -> int:
        """Which heads and columns of them."""
        return self.rank % self.tensor

    @property
    def first(self) -> bool:
        """Whether its stage begins with the embedding."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether its stage ends with the head."""
        return self.stage == self.pipeline - 1

    @property
    def teller(self) -> int:
        """The rank that has a pass's output at the end."""
        return (self.pipeline - 1) * self.tensor

    def at(self, rank: int) -> Topology:
        """The same, as another rank sees it."""
        return replace(self, rank=rank)

    def layers(self, total: int) -> range:
        """The stage's layers. As even as can be; earlier stages get what is left over, because the
        last one has the head besides."""
        each, over = divmod(total, self.pipeline)
        begin = self.stage * each + min(self.stage, over)
        return range(begin, begin + each + (self.stage < over))

    def kv_heads(self, total: int) -> range:
        """The key heads of the shard. Where there are more shards than key heads, neighbours have
        the same one."""
        begin = self.shard * total // self.tensor
        return range(begin, begin + max(1, total // self.tensor))

    def require(self, *, layers: int, heads: int, kv_heads: int, intermediate: int) -> None:
        """Raise ConfigError where a model of this shape cannot be divided so."""
        if self.pipeline > layers:
            raise ConfigError(f"--pipeline-parallel {self.pipeline}: the model has {layers} layers")
        flag = f"--tensor-parallel {self.tensor}"
        for name, count in (("heads", heads), ("columns of its MLP", intermediate)):
            if count % self.tensor:
                raise ConfigError(f"{flag}: does not divide the model's {count} {name}")
        if kv_heads % self.tensor and self.tensor % kv_heads:
            raise ConfigError(f"{flag}: {kv_heads} key heads can be neither divided nor repeated")
