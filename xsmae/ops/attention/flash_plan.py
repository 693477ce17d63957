"""Sizes for the kernels of flash_kernels.py: rows, warps and heads per program.

They follow measurements on an H100 (benchmarks/RESULTS.md) in bfloat16. Sizes for
float32, which is for comparisons, save registers.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.experimental import pallas as pl

# Most tokens for which a program holds whole rows of scores: forward, and backward by
# bytes per number (2: bfloat16, 4: float32).
WHOLE_FORWARD, WHOLE_BACKWARD = 256, {2: 128, 4: 256}

# Most numbers of the keys (tokens x columns) that such a program may hold, by bytes per
# number. The forward limit is the shared memory of a Hopper SM. The backward limit is
# the registers, which accumulate the gradients of keys and values in float32.
HELD_FORWARD = {2: 256 * 128, 4: 128 * 64}
HELD_BACKWARD = {2: 80 * 128, 4: 64 * 64}


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows of a sample from `start` on; `inside` if all are known to be tokens."""

    start: int | jax.Array
    rows: int
    inside: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shapes that a kernel is compiled for, and the sizes that follow."""

    batch: int
    tokens: int
    num_heads: int
    head_dim: int
    itemsize: int
    backward: bool

    @property
    def columns(self) -> int:
        """The width of a block: the next power of two >= head_dim."""
        return pl.next_power_of_2(self.head_dim)

    @property
    def tiles(self) -> list[Block]:
        """Tiles of all keys, from the binary digits of their number of sixteens."""
        sixteens, start, tiles = pl.cdiv(self.tokens, 16), 0, []
        for digit in reversed(range(sixteens.bit_length())):
            if sixteens >> digit & 1:
                rows = 16 << digit
                tiles.append(Block(start, rows, start + rows <= self.tokens))
                start += rows
        return tiles

    @property
    def padded(self) -> int:
        """Tokens of all tiles: a multiple of 16."""
        return 16 * pl.cdiv(self.tokens, 16)

    @property
    def held(self) -> int:
        """How many numbers the keys of a head have."""
        return self.padded * self.columns

    @property
    def whole(self) -> bool:
        """True if a program holds whole rows of scores."""
        held = HELD_BACKWARD if self.backward else HELD_FORWARD
        longest = WHOLE_BACKWARD[self.itemsize] if self.backward else WHOLE_FORWARD
        return self.held <= held[self.itemsize] and self.tokens <= longest

    @property
    def rows(self) -> int:
        """Rows of a block of queries; of a block of keys too with a running softmax."""
        if self.itemsize == 4:
            choices = (64, 32) if self.whole and self.padded <= 64 else (32,)
        elif not self.whole or (not self.backward and self.tokens > 128):
            choices = (64,)
        elif self.backward:
            choices = (16 * self.num_warps, max(16, 8 * self.num_warps))
        else:
            choices = (128,) if self.held > 64 * 128 else (64, 32)
        # Choose the size with the least padding.
        return min(choices, key=lambda rows: pl.cdiv(self.tokens, rows) * rows)

    @property
    def blocks(self) -> int:
        """Blocks of queries per sample."""
        return pl.cdiv(self.tokens, self.rows)

    @property
    def tail(self) -> int:
        """Rows of the block after the last full one."""
        return max(16, pl.next_power_of_2(self.tokens % self.rows))

    @property
    def heads(self) -> int:
        """Heads per program with whole rows: about 128 tokens in total."""
        most = max(1, 128 // self.padded)
        return max(n for n in range(1, most + 1) if self.num_heads % n == 0)

    @property
    def grid(self) -> tuple[int, ...]:
        # The heads of a sample share memory lines, so their programs come in a row.
        if self.whole:
            return self.num_heads // self.heads, self.batch
        return self.blocks, self.num_heads, self.batch

    @property
    def num_warps(self) -> int:
        """Warps per program.

        Forward: one per 16 queries. Backward with whole rows: 40 gradients per thread.
        Backward otherwise, and in float32: enough to spill few registers.
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
        """Pipeline stages of loads, at least 1; each takes shared memory."""
        if self.itemsize == 4:  # two stages of 127 x 64 do not fit on an A100
            return 1 if self.whole and self.held > 64 * 64 else 2
        if self.whole:
            return 3 if self.held <= 64 * 128 else 1
        return 3 if self.columns < 128 else 1

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5
