"""Files of models and tensors."""
