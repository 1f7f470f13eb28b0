"""What the kernels move and compute, counted while they are interpreted, against the least possible. Run like
check_interpreted.py.

Memory-bound ops: unique bytes of all launches (with inverse maps and partial sums, which the least possible does without)
within 10 %. Products: at least 90 % of the executed operations useful (60 % for attention over a few hundred tokens), at the
token counts of the published models, with a few columns and heads instead of all: what is left out divides into tiles without
remainder (1280 columns, say, by 128).
"""

from tests.support import interpreted

interpreted.install()

import pytest  # noqa: E402
import torch  # noqa: E402

from stmae.kernels.linear import cast  # noqa: E402
from stmae.kernels.mlp import gelu, gelu_backward  # noqa: E402
from tests.kernels.lower_bounds import attention_work  # noqa: E402
from tests.kernels.suite import launch, masks, random, video_of  # noqa: E402

MEAN, STD = [0.45] * 3, [0.225] * 3
BF16 = torch.bfloat16


def nbytes(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def assert_traffic(traffic, read, written):
    assert traffic.read + traffic.written <= 1.1 * (read + written), (
        f"reads {traffic.read} bytes of {read} needed and writes {traffic.written} of {written}"
    )


def test_random_masking():
    noise = torch.rand(4, 1568)
    with interpreted.Traffic() as traffic:
        result = launch("random_masking", noise, 156)
    assert_traffic(traffic, nbytes(noise), nbytes(*result))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_gather_and_restore_tokens(dtype):
    B, N, K, D = 4, 392, 39, 256
    keep, _ = masks(B, N, K, "cpu")
    x, tokens, mask_token, position = (random(*s, dtype=dtype) for s in ((B, N, D), (B, K, D), (D,), (N, D)))
    with interpreted.Traffic() as traffic:
        launch("gather_tokens", x, keep)
    assert_traffic(traffic, nbytes(tokens, keep), nbytes(tokens))
    with interpreted.Traffic() as traffic:
        launch("gather_tokens_backward", tokens, keep, N)
    assert_traffic(traffic, nbytes(tokens, keep), nbytes(x))
    with interpreted.Traffic() as traffic:
        launch("restore_tokens", tokens, keep, mask_token, position)
    assert_traffic(traffic, nbytes(tokens, keep, mask_token, position), nbytes(x))
    with interpreted.Traffic() as traffic:
        launch("restore_tokens_backward", x, keep, dtype)
    assert_traffic(traffic, nbytes(x, keep), nbytes(tokens, mask_token, position))


@pytest.mark.parametrize("dtype, D", [(torch.float32, 384), (BF16, 192), (BF16, 1280)], ids=str)
def test_add_layer_norm(dtype, D):
    """A float32 stream under autocast: 12 bytes an element forward, 16 backward."""
    rows = 2 * 157
    x, branch, weight, bias = random(rows, D), random(rows, D, dtype=dtype), random(D), random(D)
    with interpreted.Traffic() as traffic:
        sum, out, mean, rstd = launch("add_layer_norm", x, branch, weight, bias, 1e-6, dtype)
    assert_traffic(traffic, nbytes(x, branch, weight, bias), nbytes(sum, out, mean, rstd))
    with interpreted.Traffic() as traffic:
        grads = launch("add_layer_norm_backward", x, out, sum, mean, rstd, weight, dtype)
    assert_traffic(traffic, nbytes(x, out, sum, mean, rstd, weight), nbytes(*grads))
    with interpreted.Traffic() as traffic:
        launch("_layer_norm", x, weight, bias, 1e-6, dtype)
    assert_traffic(traffic, nbytes(x, weight, bias), nbytes(out, mean, rstd))


def test_gelu_and_cast():
    hidden, grad = random(4 * 156, 768, dtype=BF16), random(4 * 156, 768, dtype=BF16)
    with interpreted.Traffic() as traffic:
        grads = gelu_backward(hidden, grad, torch.float32)
    assert_traffic(traffic, nbytes(hidden, grad), nbytes(*grads))
    with interpreted.Traffic() as traffic:
        activation = gelu(hidden)
    assert_traffic(traffic, nbytes(hidden), nbytes(activation))
    weight, bias = random(192, 768), random(192)
    with interpreted.Traffic() as traffic:
        casts = cast(weight, bias, BF16)
    assert_traffic(traffic, nbytes(weight, bias), nbytes(*casts))


@pytest.mark.parametrize("layout", ["channels-last", "planar"])
def test_patch_loss(layout):
    B, N = 1, 4 * 7 * 7
    video = video_of(layout, torch.uint8, (B, 3, 8, 112, 112), "cpu")
    _, masked = masks(B, N, N // 10, "cpu")
    M, frames = masked.shape[1], list(range(0, 8, 2))
    pred, grad = random(B, M, 768, dtype=BF16), torch.rand(B, M)
    pixels = B * 4 * 112 * 112 * 3  # of the frames; the few patches that are not masked fraction the sectors of the others
    with interpreted.Traffic() as traffic:
        _, mean, rstd = launch("patch_loss", pred, video, masked, [1, 16, 16], frames, 1, MEAN, STD)
    assert_traffic(traffic, nbytes(pred, masked) + pixels, 3 * nbytes(mean))
    with interpreted.Traffic() as traffic:
        launch("patch_loss_backward", grad, pred, video, masked, mean, rstd, [1, 16, 16], frames, MEAN, STD)
    assert_traffic(traffic, nbytes(pred, masked, grad, mean, rstd) + pixels, nbytes(pred))


PATCHIFY = {"base, large": ((2, 16, 16), 1568, 156), "huge": ((2, 14, 14), 2048, 204)}


@pytest.mark.parametrize("patch, N, K", PATCHIFY.values(), ids=PATCHIFY)
def test_products_of_masked_patchify(patch, N, K):
    B, D = 4, 128
    video = video_of("channels-last", torch.uint8, (B, 3, 16, 224, 224), "cpu")
    keep, _ = masks(B, N, K, "cpu")
    weight = random(D, 3, *patch, dtype=BF16)
    useful = 2 * B * K * weight.numel()
    with interpreted.Traffic(memory=False) as traffic:
        out = launch("masked_patchify", video, keep, weight, None, None, MEAN, STD)
    assert useful <= traffic.operations <= useful / 0.9
    with interpreted.Traffic(memory=False) as traffic:
        launch("masked_patchify_backward", out, video, keep, weight, None, None, MEAN, STD)
    assert useful <= traffic.operations <= useful / 0.9


def test_memory_of_masked_patchify():
    B, D, N, K, patch = 4, 64, 392, 39, (2, 16, 16)
    video = video_of("channels-last", torch.uint8, (B, 3, 16, 112, 112), "cpu")
    keep, _ = masks(B, N, K, "cpu")
    weight, bias, position = random(D, 3, *patch, dtype=BF16), random(D, dtype=BF16), random(N, D)
    with interpreted.Traffic() as traffic:
        out = launch("masked_patchify", video, keep, weight, bias, position, MEAN, STD)
    # Memory gives sectors of 32 bytes, and a run of 48 lies in two or three: each of those is to be read once.
    read = sectors_of(video, keep, patch) * 32 + nbytes(keep, weight, bias, position[keep.unique()])
    assert_traffic(traffic, read, nbytes(out))


def sectors_of(video, keep, patch):
    B, C, T, H, W = video.shape
    address = torch.arange(video.numel()).view(B, T, H, W, C)
    cells = address.view(B, T // patch[0], patch[0], H // patch[1], patch[1], W // patch[2], patch[2], C)
    cells = cells.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, -1, C * patch[0] * patch[1] * patch[2])
    kept = cells.gather(1, keep.unsqueeze(-1).expand(-1, -1, cells.shape[2]))
    return ((kept + video.data_ptr() % 32) // 32).unique().numel()


ATTENTION = {  # queries and keys, head dim: the encoder sees a tenth of the tokens and the class token, the decoder all
    "encoder base, large": (157, 64),
    "encoder base, no class token": (156, 64),
    "encoder huge": (205, 80),
    "decoder, 16 heads": (1569, 32),
    "decoder, 8 heads": (1568, 64),
}


@pytest.mark.parametrize("N, D", ATTENTION.values(), ids=ATTENTION)
def test_attention(N, D):
    """Tiles are chosen by instructions for a useful score: a short sequence may waste more products than small tiles would."""
    least = 0.9 if N > 1000 else 0.6
    qkv = random(1, N, 3, 1, D, dtype=BF16)
    _, useful = attention_work(1, N, 1, D)
    with interpreted.Traffic(memory=False) as traffic:
        out, lse = launch("attention_qkvpacked", qkv, D**-0.5)
    useful *= 1 + 8 / (2 * D)  # and the row sums, a product with 8 columns of ones
    assert useful <= traffic.operations <= useful / least
    with interpreted.Traffic(memory=False) as traffic:
        launch("attention_qkvpacked_backward", out, qkv, out, lse, D**-0.5)
    # Three products for grad_q, four for grad_k and grad_v: the scores are made in each, so that no atomics are needed.
    _, useful = attention_work(1, N, 1, D, backward=True)
    assert useful <= traffic.operations <= useful / least
