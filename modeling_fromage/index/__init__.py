"""An index of images: built, searched, kept in a folder, published."""

from .index import FromageImageIndex

__all__ = ["FromageImageIndex"]
