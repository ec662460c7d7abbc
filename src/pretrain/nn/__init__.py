"""Tensors in, tensors out: the one block that every family is made of, and its parts. Knows no family."""

from __future__ import annotations
