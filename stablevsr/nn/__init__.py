"""The networks: tensors in, tensors out. No files, no devices, no schedule."""
