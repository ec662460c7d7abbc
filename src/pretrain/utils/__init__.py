"""Helpers of every part: durable files, locks, strict JSON, tensors on disk, line charts. Imports errors only."""
