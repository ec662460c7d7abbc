"""Helpers for all packages: durable files, locks, strict JSON, tensors on disk, line charts.

Of the rest of the package they import only ``pretrain.errors`` and ``pretrain.printing``.
"""
