"""The ops on lists of videos, and the masks of sequences one after another: each as by itself, ids numbered through all."""

import functools

import pytest
import torch
from hypothesis import strategies as st

from stmae import ops, reference
from tests.ops.test_attention_varlen import offsets
from tests.ops.test_properties import BF16, drawn, layout, normal
from tests.support import exact
from tests.support.tolerance import assert_as_good_as

S = torch.ops.stmae


@st.composite
def cases(draw):
    """Videos of 1 to 4 grids, each with its own layout in memory, and ids of some of the tokens of each."""
    C, patch = draw(st.integers(1, 4)), (draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 17)))
    pixels, seed = draw(st.sampled_from([torch.uint8, torch.float32, BF16])), draw(st.integers(0, 99))
    videos, ids, counts, first = [], [], [], 0
    for index in range(draw(st.integers(1, 4))):
        t, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
        generator = torch.Generator().manual_seed(seed + index)
        x = torch.randint(0, 256, (C, t * patch[0], h * patch[1], w * patch[2]), generator=generator)
        videos.append(draw(layout())((x / 255).to(pixels) if pixels.is_floating_point else x.to(pixels)))
        count = draw(st.integers(0, t * h * w))
        ids.append(first + torch.randperm(t * h * w, generator=generator)[:count])
        counts.append(count)
        first += t * h * w
    return videos, patch, torch.cat(ids), counts, first, seed


def gradients(call, leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out.sum(), leaves)


def one_by_one(videos, counts, ids, tokens):
    """(index, video with a batch of 1, ids of its own [1, K], its slice of ids, its slice of tokens)."""
    start = first = 0
    for index, (video, count) in enumerate(zip(videos, counts)):
        own = tokens(video)
        yield index, video[None], ids[None, start : start + count] - first, slice(start, start + count), slice(first, first + own)
        start, first = start + count, first + own


@drawn(cases(), 10)
def test_masked_patchify(capability, case):
    videos, patch, keep, counts, N, seed = case
    D, dtype = 1 + seed % 40, BF16 if seed % 3 == 0 else torch.float32
    shapes = (D, videos[0].shape[0], *patch), (D,), (N, D)
    parameters = [normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    cu_seqlens = offsets(counts)
    ours = gradients(lambda *p: ops.masked_patchify_varlen(videos, keep, cu_seqlens, *p), parameters)
    plain = gradients(lambda *p: reference.masked_patchify_varlen(videos, keep, cu_seqlens, *p), parameters)
    total = None
    for _, video, own, rows, tokens in one_by_one(videos, counts, keep, lambda x: x[0].numel() // torch.Size(patch).numel()):
        weight, bias, position = parameters
        own_parameters = weight, bias, position[tokens]
        alone = gradients(functools.partial(ops.masked_patchify, video, own), own_parameters)
        assert torch.equal(ours[0][rows], alone[0][0])
        assert torch.equal(ours[3][tokens], alone[3])
        double = gradients(functools.partial(exact.masked_patchify, video, own), [x.double() for x in own_parameters])
        total = double[1:3] if total is None else [a + b for a, b in zip(total, double[1:3])]
    for name, a, b, c in zip(("grad_weight", "grad_bias"), plain[1:3], total, ours[1:3]):
        assert_as_good_as(a, b, c, factor=4.0, name=name)


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")  # of no patches
@drawn(cases(), 10)
def test_patch_loss(capability, case):
    videos, patch, masked, counts, _, seed = case
    C = videos[0].shape[0]
    P, size = patch[1] * patch[2] * C, (1, *patch[1:])
    frames = [list(range(0, video.shape[1], patch[0])) for video in videos]  # one of each time slice
    pred = normal(seed, sum(counts), P, dtype=BF16 if seed % 2 else torch.float32)
    normalize = P > C and (True, "channel", False)[seed % 3]
    if normalize == "channel" and P // C < 2:
        normalize = False
    options = {"patch_size": size, "normalize": normalize, "reduction": "none"}
    ours = gradients(lambda p: ops.patch_loss_varlen(p, videos, masked, offsets(counts), frames=frames, **options), [pred])
    assert ours[0].shape == (sum(counts),)
    for index, video, own, rows, _ in one_by_one(videos, counts, masked, lambda x: x[0].numel() // torch.Size(patch).numel()):
        loss = functools.partial(ops.patch_loss, video=video, masked=own, frames=frames[index], **options)
        alone = gradients(loss, [pred[None, rows]])
        assert torch.equal(ours[0][rows], alone[0][0]) and torch.equal(ours[1][rows], alone[1][0])
    if (
        normalize
    ):  # of a patch that hardly varies, the reference's own rounding is large; the op by itself is tested against float64
        return
    plain = reference.patch_loss_varlen(pred, videos, masked, offsets(counts), frames=frames, **options)
    torch.testing.assert_close(ours[0], plain.float(), rtol=1e-3, atol=1e-4)


@drawn(st.tuples(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.integers(0, 9), layout()), 12)
def test_random_masking(capability, case):
    lengths, levels, place = case
    lengths = [n if n != 1 else 2 for n in lengths]
    num_keep = [min(max(1, n * 3 // 10), n - 1) if n else 0 for n in lengths]
    noise = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(sum(lengths)))
    noise = place((noise * levels).floor() if levels else noise)
    keep, masked = ops.random_masking_varlen(noise, offsets(lengths), num_keep)
    plain = reference.random_masking_varlen(noise, offsets(lengths), num_keep)
    assert torch.equal(keep, plain[0]) and torch.equal(masked, plain[1])


def test_very_many_and_very_unequal_sequences(threads):
    lengths = torch.randint(2, 5, (100_000,), generator=torch.Generator().manual_seed(0)).tolist()
    for every in (lengths, [12_544, 2]):
        noise, results = torch.rand(sum(every)), []
        for count in (1, 3):
            threads(count)
            results.append(ops.random_masking_varlen(noise, offsets(every), [1] * len(every)))
        assert all(torch.equal(a, b) for a, b in zip(*results))
        lowest = torch.stack([noise[a:b].argmin() + a for a, b in zip([0, every[0]], [every[0], sum(every[:2])])])
        assert torch.equal(results[0][0][:2], lowest)


def test_gather_and_restore_take_sequences_by_their_ids():
    """With a batch of 1, as they are: forward bit for bit, and the gradients of what is shared are the sums of each one's."""
    lengths, kept, D = [20, 5, 60], [4, 1, 30], 24
    keep, masked = ops.random_masking_varlen(torch.rand(85), offsets(lengths), kept)
    tokens, mask_token, position = torch.randn(35, D), torch.randn(D), torch.randn(85, D)

    def decode(tokens, mask_token, position):
        x = ops.restore_tokens(tokens[None], keep[None], mask_token, position)
        return ops.gather_tokens(x, masked[None])[0]

    out, *grads = gradients(decode, (tokens, mask_token, position))
    first = start = row = 0
    shared = torch.zeros(D)
    for n, k in zip(lengths, kept):
        own, hidden = keep[None, start : start + k] - first, masked[None, row : row + n - k] - first

        def alone(tokens, mask_token, position, own=own, hidden=hidden):
            return ops.gather_tokens(ops.restore_tokens(tokens[None], own, mask_token, position), hidden)[0]

        expected = gradients(alone, (tokens[start : start + k], mask_token, position[first : first + n]))
        assert torch.equal(out[row : row + n - k], expected[0])
        assert torch.equal(grads[0][start : start + k], expected[1]) and torch.equal(grads[2][first : first + n], expected[3])
        shared += expected[2]
        first, start, row = first + n, start + k, row + n - k
    torch.testing.assert_close(grads[1], shared)


def calls():
    videos = [torch.randint(0, 256, (3, t, h, w), dtype=torch.uint8) for t, h, w in ((4, 8, 8), (2, 8, 12))]
    ids, cu_seqlens = torch.tensor([1, 5, 7, 8, 13]), offsets([3, 2])
    embed = videos, ids, cu_seqlens, torch.randn(6, 3, 2, 4, 4), torch.randn(6), torch.randn(14, 6)
    return embed, (torch.randn(5, 96), videos, ids, cu_seqlens)


def test_opcheck():
    embed, loss = calls()
    colour = [0.4] * 3, [0.2] * 3
    arguments = *embed[:3], *(x.requires_grad_() for x in embed[3:]), *colour
    torch.library.opcheck(S.masked_patchify_varlen.default, arguments)
    detached = *embed[:3], *(x.detach() for x in embed[3:]), *colour
    torch.library.opcheck(S.masked_patchify_varlen_backward.default, (torch.randn(5, 6), *detached))
    rest = [2, 4, 4], [0, 1, 2, 3, 0, 1], [4, 2]
    torch.library.opcheck(S.patch_loss_varlen.default, (loss[0].requires_grad_(), *loss[1:], *rest, 1, *colour))
    pred = loss[0].detach()
    _, *kept = S.patch_loss_varlen(pred, *loss[1:], *rest, 1, *colour)
    torch.library.opcheck(S.patch_loss_varlen_backward.default, (torch.randn(5), pred, *loss[1:], *kept, *rest, *colour))
    torch.library.opcheck(S.random_masking_varlen.default, (torch.rand(9), offsets([4, 5]), offsets([1, 2]), 3))


def test_compile_without_graph_breaks():
    embed, loss = calls()

    def step(weight, bias, position, pred, noise):
        keep, masked = ops.random_masking_varlen(noise, offsets_of_noise, [3, 2])
        x = ops.masked_patchify_varlen(embed[0], keep, embed[2], weight, bias, position)
        return x.sum() + ops.patch_loss_varlen(pred, embed[0], embed[1], embed[2], patch_size=(2, 4, 4)) + masked.sum()

    offsets_of_noise = offsets([8, 6])
    leaves = [*embed[3:], loss[0]]
    noise = torch.rand(14)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(gradients(lambda *x, f=f: f(*x, noise), leaves) for f in (step, compiled))):
        torch.testing.assert_close(a, b)


BAD = [
    (0, [], r"expected videos a list of one tensor \[C, T, H, W\] or more, got list"),
    (0, torch.zeros(2, 3, 4, 8, 8), "expected videos a list of one tensor"),
    (0, [torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8, dtype=torch.uint8)], r"expected videos\[1\] \[C, T, H, W\] float32"),
    (0, [torch.zeros(3, 4, 8, 8), torch.zeros(1, 4, 8, 8)], r"expected videos\[1\] .*got \[1, 4, 8, 8\]"),
    (0, [torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 9)], "expected frames, height and width that are multiples of the patch"),
    (0, [torch.zeros(3, 4, 8, 8)], r"expected cu_seqlens \[S \+ 1\] .*here \[2\].*got \[3\] int"),
    (1, torch.zeros(1, 5, dtype=torch.int64), r"expected keep \[sum K\]"),
    (2, torch.zeros(3), "expected cu_seqlens"),
    (5, torch.zeros(13, 6), r"expected position \[sum N, D\] .*here \[14, 6\]"),
]


@pytest.mark.parametrize(("index", "value", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(index, value, message):
    embed, _ = calls()
    arguments = [value if i == index else x for i, x in enumerate(embed)]
    with pytest.raises(ValueError, match=f"masked_patchify_varlen: {message}"):
        ops.masked_patchify_varlen(*arguments)


@pytest.mark.parametrize("frames", [[[0, 1]], [[0, 1, 2], [0, 1]], [[0, 9], [0, 1]], [[0, 1], 3]], ids=str)
def test_bad_frames(frames):
    _, loss = calls()
    with pytest.raises(ValueError, match="patch_loss_varlen: expected frames"):
        ops.patch_loss_varlen(*loss, patch_size=(2, 4, 4), frames=frames)


@pytest.mark.parametrize("num_keep", [[1], [0, 2], [4, 2], [1, 6], [-1, 2], [1.5, 2], [2, 3, 1]], ids=str)
def test_bad_num_keep(num_keep):
    with pytest.raises((ValueError, RuntimeError), match="random_masking_varlen: expected num_keep"):
        ops.random_masking_varlen(torch.rand(9), offsets([4, 5]), num_keep)


def test_nan_in_noise_is_said_with_its_place():
    noise = torch.rand(9)
    noise[6] = float("nan")
    with pytest.raises(RuntimeError, match=r"random_masking_varlen: expected noise without NaN, got NaN at \[6\] in sequence 1"):
        ops.random_masking_varlen(noise, offsets([4, 5]), [1, 1])


def test_flops_are_the_kept_patches_times_the_weight():
    from torch.utils.flop_counter import FlopCounterMode

    videos = [torch.rand(3, 2, 16, 24), torch.rand(3, 4, 8, 8)]
    weight = torch.rand(5, 3, 2, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = ops.masked_patchify_varlen(videos, torch.tensor([0, 4, 6]), torch.tensor([0, 2, 3]), weight, None, None)
        assert counter.get_total_flops() == 2 * 3 * weight.numel()
        out.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 3 * weight.numel())
