"""Audio: decoding of ``.wav`` files, the log-mel processor, rows with labels, augmentation."""

from __future__ import annotations

from pretrain.data.audio.decode import Clip
from pretrain.data.audio.processor import AudioProcessor

__all__ = ["AudioProcessor", "Clip"]
