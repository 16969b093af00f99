"""What this machine can run, what a video needs, how two models differ."""
