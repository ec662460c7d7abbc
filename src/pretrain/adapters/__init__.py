"""Low-rank adapters: the layer, its placement in a model, and PEFT's files; ``pretrain.lora`` is the public API."""
