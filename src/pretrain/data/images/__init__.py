"""Images: decoding, the image processor, rows with labels, augmentation. Needs Pillow, the extra ``vision``."""

from __future__ import annotations

from pretrain.data.images.decode import FileItem, Picture
from pretrain.data.images.processor import ImageProcessor

__all__ = ["FileItem", "ImageProcessor", "Picture"]
