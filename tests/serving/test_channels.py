"""Numbers survive the channels of every dtype that a model is served in."""

import pytest
import torch

from tprl.serving.channels import from_channels, to_channels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_come_back(dtype: torch.dtype) -> None:
    numbers = torch.tensor([[0, 255, 256], [257, 283, 1023], [65535, 16383, 1]])
    channels = to_channels(numbers, dtype)
    assert (channels.dtype, channels.shape) == (dtype, (3, 6))
    assert torch.equal(from_channels(channels), numbers)
    assert not torch.equal(numbers.bfloat16().long(), numbers)  # what the channels are for
