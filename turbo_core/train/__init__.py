"""Training a Wan transformer: a teacher, its student, sparse attention; for a finetune, or TinyWan from nothing."""
