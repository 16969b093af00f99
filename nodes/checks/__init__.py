"""What is wrong before anything runs: from the headers of files, and from the graph that was queued."""
