"""Images too large for memory, in parts: `Tiled` encodes and decodes them exactly or by blended tiles."""

from latentae.models.tiling.tiled import Tiled

__all__ = ["Tiled"]
