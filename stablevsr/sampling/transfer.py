"""From the computer's memory to the device."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for what the device is at: the host goes on and gives it more to do."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # from other memory, CUDA makes the host wait
