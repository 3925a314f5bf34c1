"""The three ways in which a converted model attends, one object each; nothing else compares their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Bidirectional:
    """Every token sees the whole text; a canvas of masks is filled in any order."""

    name: ClassVar[str] = "bidirectional"
    has_blocks: ClassVar[bool] = False  # whether text is cut into blocks, from left to right
    drafts: ClassVar[bool] = False  # whether adapters only propose what the untouched base verifies
    default_block_length: ClassVar[int | None] = None
    min_block_length: ClassVar[int] = 1

    block_length: int | None = None
    clean_context: str | None = None
    right_shift_logits: bool = True


@dataclass(frozen=True)
class Block(Bidirectional):
    """Blocks from left to right, bidirectional inside; finished blocks are clean context, causal or block-causal."""

    name: ClassVar[str] = "block"
    has_blocks: ClassVar[bool] = True
    default_block_length: ClassVar[int | None] = 4


@dataclass(frozen=True)
class Lossless(Block):
    """Adapters draft a block behind the base's own text, and the base accepts what it would have said itself."""

    name: ClassVar[str] = "lossless"
    drafts: ClassVar[bool] = True
    default_block_length: ClassVar[int | None] = 8
    min_block_length: ClassVar[int] = 2  # the first token of a draft is the base's own


MODES = {mode.name: mode for mode in (Bidirectional, Block, Lossless)}
