"""`Tiled` encodes and decodes images too large for memory, exactly or by blended tiles."""

from latentae.models.tiling.tiled import Tiled

__all__ = ["Tiled"]
