"""One LoRA adapter as data: what its folder may hold, checked before PEFT or transformers sees it."""
