"""A network as slimline sees it."""

from slimline.model.model import Model

__all__ = ["Model"]
