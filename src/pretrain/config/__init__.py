"""Settings: the sections of a run, their strict reading from YAML, Python and the command line."""

from pretrain.config.run import (
    DataConfig,
    Limit,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    fields,
    parse_every,
    parse_limit,
)

__all__ = [
    "DataConfig",
    "Limit",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "fields",
    "parse_every",
    "parse_limit",
]
