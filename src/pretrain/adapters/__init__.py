"""Low-rank adapters: the layer, where it goes, and PEFT's files; ``pretrain.lora`` is the public side."""
