"""Checkpoints as others publish them: Diffusers' names, models in several files, what ComfyUI adds to a file."""
