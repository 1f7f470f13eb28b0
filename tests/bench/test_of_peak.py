"""The parts of the peak are ratios of what was done, for every op that is listed; at sizes at which they mean nothing."""

import torch

from bench import of_peak


def test_every_op_and_direction_is_measured():
    found = list(of_peak.measure(torch.float32, rounds=1, seconds=0, scale=8, size=64, copied=2**12))
    names = [name for name, *_ in found]
    for op in (
        "attention",
        "masked_patchify",
        "patch_loss",
        "restore_tokens",
        "gather_tokens",
        "linear",
        "mlp",
        "add_layer_norm",
    ):
        assert any(name.startswith(op) for name in names) and any(
            name.startswith(op) and name.endswith("backward") for name in names
        )
    assert {kind for _, kind, *_ in found} == {"flops", "bytes"}
    assert all(part > 0 and rate > 0 for *_, part, rate in found)
    assert [
        name for name, *_ in of_peak.measure(torch.float32, rounds=1, seconds=0, scale=8, size=64, copied=2**12, only="mlp")
    ] == [
        "mlp, 80 x 96",
        "mlp, 80 x 96, backward",
    ]
