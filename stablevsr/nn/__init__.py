"""The networks: tensors in, tensors out. No files, devices or schedules."""
