"""peft and disk: the configuration, the drawn LoRA layer, saving, loading and exporting adapters."""
