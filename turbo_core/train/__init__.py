"""Training: TinyWan from nothing, and distilling and sparsifying a finetune of Wan by the same code."""
