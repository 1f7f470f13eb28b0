import torch.nn.functional as F


def linear(x, weight, bias=None):  # x [..., K], weight [N, K], bias [N] -> [..., N]
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
