"""Distributed training: process groups, device mesh, FSDP2, DDP, tensor parallelism, watchdog and launching."""
