"""Training a Wan transformer: a teacher, its student, sparse attention; from a finetune, or for TinyWan from nothing."""
