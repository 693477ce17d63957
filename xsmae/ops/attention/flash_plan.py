"""How the kernels of flash_kernels.py are cut: rows, warps, heads of a program.

By what was measured on an H100 (benchmarks/RESULTS.md), in bfloat16. Float32, which is
for comparisons, is cut for fewer registers.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.experimental import pallas as pl

# Tokens up to which a program may hold whole rows of scores; backward in bfloat16 and
# in float32, by the bytes of a number.
WHOLE_FORWARD, WHOLE_BACKWARD = 256, {2: 128, 4: 256}

# Numbers of the keys (tokens times columns) that such a program may hold, by the bytes
# of a number. Forward, the shared memory of a Hopper's core is the limit; backward the
# registers, which gather the gradients of keys and values in float32.
HELD_FORWARD = {2: 256 * 128, 4: 128 * 64}
HELD_BACKWARD = {2: 80 * 128, 4: 64 * 64}


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows of a sample from `start` on; `inside` if it is known that all are tokens."""

    start: int | jax.Array
    rows: int
    inside: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes that a kernel is compiled for, and those that follow from them."""

    batch: int
    tokens: int
    num_heads: int
    head_dim: int
    itemsize: int
    backward: bool

    @property
    def columns(self) -> int:
        """Of a block: the power of two that holds head_dim."""
        return pl.next_power_of_2(self.head_dim)

    @property
    def tiles(self) -> list[Block]:
        """Of all keys: the binary digits of their sixteens."""
        sixteens, start, tiles = pl.cdiv(self.tokens, 16), 0, []
        for digit in reversed(range(sixteens.bit_length())):
            if sixteens >> digit & 1:
                rows = 16 << digit
                tiles.append(Block(start, rows, start + rows <= self.tokens))
                start += rows
        return tiles

    @property
    def padded(self) -> int:
        """Tokens of the tiles."""
        return 16 * pl.cdiv(self.tokens, 16)

    @property
    def held(self) -> int:
        """Numbers of the keys of a head."""
        return self.padded * self.columns

    @property
    def whole(self) -> bool:
        """Whether a program holds whole rows of scores."""
        held = HELD_BACKWARD if self.backward else HELD_FORWARD
        longest = WHOLE_BACKWARD[self.itemsize] if self.backward else WHOLE_FORWARD
        return self.held <= held[self.itemsize] and self.tokens <= longest

    @property
    def rows(self) -> int:
        """Of a block of queries, and of one of keys where a softmax is running."""
        if self.itemsize == 4:
            choices = (64, 32) if self.whole and self.padded <= 64 else (32,)
        elif not self.whole or (not self.backward and self.tokens > 128):
            choices = (64,)
        elif self.backward:
            choices = (16 * self.num_warps, max(16, 8 * self.num_warps))
        else:
            choices = (128,) if self.held > 64 * 128 else (64, 32)
        # What pads the sequence less.
        return min(choices, key=lambda rows: pl.cdiv(self.tokens, rows) * rows)

    @property
    def blocks(self) -> int:
        """Of queries, in a sample."""
        return pl.cdiv(self.tokens, self.rows)

    @property
    def tail(self) -> int:
        """Rows of the block after the last full one."""
        return max(16, pl.next_power_of_2(self.tokens % self.rows))

    @property
    def heads(self) -> int:
        """Of a program with whole rows: about 128 tokens' worth."""
        most = max(1, 128 // self.padded)
        return max(n for n in range(1, most + 1) if self.num_heads % n == 0)

    @property
    def grid(self) -> tuple[int, ...]:
        # What lies in the same lines of memory is next to each other: a sample's heads.
        if self.whole:
            return self.num_heads // self.heads, self.batch
        return self.blocks, self.num_heads, self.batch

    @property
    def num_warps(self) -> int:
        """Forward one for 16 queries; backward, with whole rows, 40 gradients a thread.

        Else backward, and in float32, as many as leave few registers spilled.
        """
        if self.itemsize == 4:
            warps = self.rows // 16
            if self.backward:
                keys = self.padded if self.whole else self.rows
                gradients = pl.cdiv(keys * self.columns, 1024)
                warps = max(warps, pl.next_power_of_2(gradients))
            return min(8, 2 * warps)
        if not self.backward:
            return self.rows // 16
        if self.whole:
            return min(8, pl.next_power_of_2(pl.cdiv(self.held, 32 * 40)))
        return 8 if self.columns == 128 else 4

    @property
    def num_stages(self) -> int:
        """How many blocks are loaded ahead, one included: they take shared memory."""
        if self.itemsize == 4:  # with two, 127 x 64 is too much for an A100
            return 1 if self.whole and self.held > 64 * 64 else 2
        if self.whole:
            return 3 if self.held <= 64 * 128 else 1
        return 3 if self.columns < 128 else 1

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5
