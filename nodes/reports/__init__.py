"""What nodes say of models and runs."""
