"""Vision models whose dense layers read LoRA adapters."""
