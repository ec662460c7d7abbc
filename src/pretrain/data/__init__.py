"""Data: sources, tokenizer, prepared shards, packing, order and loader. Imports no model and no torch."""

from __future__ import annotations
