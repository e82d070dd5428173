"""What is compared of two runs of training: their logs and their parameters, bit for bit."""

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


def assert_same(found: tuple[list[dict], Parameters], expected: tuple[list[dict], Parameters]):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    differ = [name for name in found[1] if not torch.equal(found[1][name], expected[1][name])]
    assert differ == []
