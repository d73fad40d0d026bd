"""Samples: where they come from, in which form, and which may be used for what."""

from slimline.data.data import Data

__all__ = ["Data"]
