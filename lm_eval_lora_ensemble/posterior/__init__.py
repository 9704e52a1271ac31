"""Members drawn from what one has: posteriors over LoRA weights, each a folder of plain adapters in the end."""
