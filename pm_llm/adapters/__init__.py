"""LoRA adapters: on disk, in memory, in a model, in the base weights, from strangers, compressed."""
