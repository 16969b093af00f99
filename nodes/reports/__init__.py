"""What nodes say of models and runs: to people, and to the host."""
