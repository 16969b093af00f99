"""The insides of ComfyUI that the nodes work on."""
