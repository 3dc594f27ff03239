"""A pack is a .safetensors file: the reader everyone has opens the pack that this project keeps as a fixture.

Touches: one file of fixtures/v1, read only.
"""

from pathlib import Path

import torch
from safetensors import safe_open

PACK = Path(__file__).parent.parent / "fixtures/v1/00112233445566778899aabbccddeeff.safetensors"


def test_safetensors_opens_a_pack_and_finds_the_tensors_bit_for_bit() -> None:
    with safe_open(PACK, framework="pt") as pack:
        assert pack.metadata() == {"format": "unbroken-pack/1"}
        found = {name: pack.get_tensor(name) for name in pack.keys()}  # noqa: SIM118 (not a dict)
    weight = torch.tensor([[1.0, -0.0, 0.5], [float("inf"), 1e-40, 3.25]])
    assert found.keys() == {"generator", "model/weight", "step"}
    assert torch.equal(found["model/weight"].view(torch.int32), weight.view(torch.int32))
    assert torch.equal(found["step"], torch.tensor(2))
    assert torch.equal(found["generator"], torch.tensor([5, 4, 3, 2, 1], dtype=torch.uint8))
