"""Attention's tiles, for each target those that do not spill there, and which of them a launch takes by default.

What a tile costs was counted in the compilers' code for it (Triton 3.9, bfloat16, tests/kernels/compile_report.py): instructions
of the main loop, exponentials among them, and instructions outside of the loop, with the last, smaller tile. A loop takes as long
as the busiest of three units: the schedulers, which issue 128 instructions of a thread a clock on a multiprocessor, the unit that
has 16 exponentials in that time, and the tensor cores. The default is the tile with the least of that for a useful score at a
launch's lengths. Nothing of this is a time: where timing is allowed, all of a list are timed.
"""

import triton

COUNTED_WITH = "3.9.0"  # the Triton whose code was counted
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
HEAD_DIMS = (32, 64, 80, 96, 128)  # that have a list
THREADS = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 64}  # of a warp
ISSUED = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "gfx942": 64}  # instructions of a thread, a clock and multiprocessor
EXPONENTIALS = {"sm_80": 16, "sm_90": 16, "sm_100": 16, "gfx942": 16}  # a clock and multiprocessor
# Dense bfloat16 operations a clock and multiprocessor, of the instructions of a warp and of those that take 64 rows: the makers'
# peaks over clocks and multiprocessors; those of a warp are 5/8 of the peak on sm_90 (Luo et al. 2024, arXiv:2402.13499), and are
# taken to be no faster on sm_100.
PRODUCTS = {"sm_80": (2048, 2048), "sm_90": (2560, 4096), "sm_100": (2560, 8192), "gfx942": (2048, 2048)}
OPERATIONS = {"attention": 4, "grad_q": 6, "grad_kv": 8}  # for a score and column of the head

# {target: {kernel: {head dim: ((warps, stages, BLOCK_M, BLOCK_N, EIGHTHS, loop, exponentials, outside), ...)}}}
TILES = {
    "sm_80": {
        "attention": {
            32: ((4, 2, 64, 128, 0, 426, 66, 693), (4, 2, 64, 64, 0, 239, 34, 669), (2, 2, 32, 32, 0, 157, 18, 519)),
            64: ((4, 2, 64, 64, 0, 328, 34, 856), (8, 2, 128, 128, 0, 540, 66, 851), (2, 2, 32, 32, 0, 269, 20, 842)),
            80: ((8, 2, 128, 64, 0, 349, 34, 996), (4, 2, 64, 64, 0, 371, 34, 1014), (2, 2, 32, 32, 0, 252, 18, 812)),
            96: ((8, 2, 128, 64, 0, 387, 34, 1045), (4, 2, 64, 64, 0, 425, 34, 1135)),
            128: ((8, 2, 64, 64, 0, 440, 24, 1332),),
        },
        "grad_q": {
            32: ((4, 2, 64, 64, 0, 256, 32, 786), (4, 2, 64, 32, 0, 138, 16, 585), (2, 2, 32, 32, 0, 147, 16, 535)),
            64: ((4, 2, 64, 32, 0, 187, 16, 765), (8, 2, 128, 32, 0, 178, 16, 801), (2, 2, 32, 32, 0, 218, 16, 845)),
            80: ((8, 2, 128, 32, 0, 213, 16, 1046), (4, 2, 64, 32, 0, 222, 16, 1020)),
            96: ((8, 2, 128, 32, 0, 233, 16, 1147), (4, 2, 64, 32, 0, 242, 16, 1132)),
            128: ((8, 2, 128, 32, 0, 272, 16, 1241), (8, 2, 32, 32, 0, 162, 8, 697)),
        },
        "grad_kv": {
            32: ((4, 2, 64, 64, 0, 326, 32, 819), (4, 2, 32, 64, 0, 178, 16, 539), (2, 2, 32, 32, 0, 189, 16, 518)),
            64: ((4, 2, 32, 64, 0, 241, 16, 695), (8, 2, 32, 128, 0, 230, 16, 732)),
            80: ((8, 2, 32, 128, 0, 274, 16, 913), (4, 2, 32, 64, 0, 283, 16, 895)),
            96: ((8, 2, 16, 128, 0, 182, 8, 968),),
            128: ((8, 2, 16, 128, 0, 212, 8, 996), (8, 2, 32, 32, 0, 202, 8, 646)),
        },
    },
    "sm_90": {
        "attention": {
            32: (
                (4, 2, 64, 128, 1, 460, 58, 746),
                (4, 2, 64, 64, 0, 240, 34, 694),
                (4, 2, 64, 128, 0, 403, 66, 746),
                (2, 2, 32, 32, 0, 167, 18, 532),
            ),
            64: (
                (4, 2, 64, 128, 0, 460, 66, 911),
                (4, 2, 64, 64, 0, 296, 34, 859),
                (8, 2, 128, 128, 0, 429, 66, 828),
            ),
            80: (
                (4, 2, 64, 128, 0, 567, 66, 1099),
                (2, 2, 32, 32, 0, 253, 18, 807),
                (8, 2, 128, 128, 0, 527, 66, 990),
            ),
            96: ((4, 2, 64, 128, 0, 599, 66, 1161), (2, 2, 32, 32, 0, 284, 18, 855)),
            128: ((4, 2, 64, 64, 0, 381, 34, 1176), (8, 2, 128, 64, 0, 353, 34, 1056)),
        },
        "grad_q": {
            32: (
                (4, 2, 64, 128, 1, 480, 56, 816),
                (4, 2, 64, 64, 0, 238, 32, 764),
                (4, 2, 64, 128, 0, 423, 64, 816),
                (2, 2, 32, 32, 0, 156, 16, 582),
            ),
            64: (
                (4, 2, 64, 128, 0, 476, 64, 1092),
                (4, 2, 64, 64, 0, 282, 32, 1058),
                (2, 2, 32, 32, 0, 213, 16, 843),
            ),
            80: (
                (4, 2, 64, 128, 0, 545, 64, 1313),
                (4, 2, 64, 64, 0, 326, 32, 1238),
                (2, 2, 32, 32, 0, 240, 16, 1072),
            ),
            96: ((4, 2, 64, 64, 0, 346, 32, 1382), (4, 2, 64, 32, 0, 238, 16, 1136)),
            128: (
                (8, 2, 128, 64, 0, 342, 32, 1469),
                (4, 2, 64, 64, 0, 361, 32, 1597),
                (4, 2, 64, 32, 0, 244, 16, 1272),
            ),
        },
        "grad_kv": {
            32: ((4, 2, 64, 64, 0, 295, 32, 749), (4, 2, 32, 64, 0, 188, 16, 515), (2, 2, 32, 32, 0, 190, 16, 513)),
            64: ((4, 2, 64, 64, 0, 334, 32, 968), (4, 2, 32, 64, 0, 215, 16, 684), (2, 2, 32, 32, 0, 265, 16, 747)),
            80: ((4, 2, 64, 64, 0, 398, 32, 1150), (4, 2, 32, 64, 0, 267, 16, 861)),
            96: ((4, 2, 32, 64, 0, 278, 16, 927),),
            128: ((4, 2, 32, 64, 0, 283, 16, 1020), (8, 2, 32, 128, 0, 280, 16, 964)),
        },
    },
    "sm_100": {
        "attention": {
            32: (
                (4, 2, 128, 64, 0, 457, 65, 1792),
                (4, 2, 64, 128, 0, 416, 65, 1406),
                (4, 2, 64, 64, 0, 274, 33, 1224),
                (2, 2, 32, 32, 0, 162, 18, 519),
            ),
            64: (
                (4, 2, 128, 64, 0, 517, 65, 2104),
                (4, 2, 64, 128, 0, 481, 65, 1601),
                (4, 2, 64, 64, 0, 325, 33, 1406),
                (2, 2, 32, 32, 0, 275, 20, 851),
            ),
            80: ((8, 2, 128, 64, 0, 339, 33, 1647), (4, 2, 64, 64, 0, 360, 33, 1616)),
            96: ((8, 2, 128, 64, 0, 348, 33, 1694), (4, 2, 64, 64, 0, 382, 33, 1775)),
            128: ((8, 2, 128, 64, 0, 360, 33, 1709), (8, 2, 64, 64, 0, 279, 17, 1273)),
        },
        "grad_q": {
            32: (
                (4, 2, 128, 64, 0, 376, 64, 1829),
                (4, 2, 64, 64, 0, 264, 32, 1313),
                (2, 2, 32, 32, 0, 134, 16, 565),
            ),
            64: (
                (4, 2, 64, 64, 0, 304, 32, 1667),
                (4, 2, 64, 32, 0, 215, 16, 1291),
                (8, 2, 128, 32, 0, 201, 16, 1240),
            ),
            80: ((8, 2, 128, 32, 0, 231, 16, 1527), (4, 2, 64, 32, 0, 236, 16, 1572)),
            96: ((8, 2, 128, 32, 0, 233, 16, 1587), (4, 2, 64, 32, 0, 243, 16, 1678)),
            128: ((8, 2, 128, 32, 0, 241, 16, 1767),),
        },
        "grad_kv": {
            32: (
                (4, 2, 64, 64, 0, 337, 32, 1403),
                (8, 2, 64, 128, 0, 324, 32, 1465),
                (2, 2, 32, 32, 0, 174, 16, 524),
            ),
            64: (
                (4, 2, 64, 64, 0, 378, 32, 1701),
                (4, 2, 32, 64, 0, 265, 16, 1234),
                (8, 2, 32, 128, 0, 253, 16, 1216),
            ),
            80: ((8, 2, 32, 128, 0, 326, 16, 1491), (4, 2, 32, 64, 0, 349, 16, 1541)),
            96: ((8, 2, 32, 128, 0, 343, 16, 1538),),
            128: ((8, 2, 16, 128, 0, 227, 8, 1493),),
        },
    },
    "gfx942": {
        "attention": {
            32: (
                (4, 2, 128, 64, 0, 380, 33, 1346),
                (2, 2, 32, 64, 0, 353, 33, 1359),
                (2, 2, 32, 32, 0, 210, 17, 846),
            ),
            64: (
                (4, 2, 128, 64, 0, 394, 33, 1618),
                (2, 2, 32, 64, 0, 389, 33, 1478),
                (2, 2, 32, 32, 0, 211, 17, 898),
            ),
            80: ((4, 2, 128, 64, 0, 545, 33, 2119), (2, 2, 32, 32, 0, 261, 17, 1102)),
            96: ((4, 2, 128, 64, 0, 492, 33, 2080), (2, 2, 32, 32, 0, 266, 17, 1229)),
            128: ((4, 2, 128, 64, 0, 520, 33, 2239), (2, 2, 32, 32, 0, 261, 17, 1178)),
        },
        "grad_q": {
            32: ((4, 2, 128, 64, 0, 387, 32, 1420), (2, 2, 32, 32, 0, 199, 16, 844), (2, 2, 32, 16, 0, 92, 4, 827)),
            64: ((4, 2, 128, 64, 0, 491, 32, 1959), (2, 2, 32, 32, 0, 254, 16, 1026), (2, 2, 32, 16, 0, 102, 4, 903)),
            80: ((4, 2, 128, 64, 0, 661, 32, 2668), (2, 2, 32, 16, 0, 124, 4, 1002)),
            96: ((2, 2, 32, 32, 0, 310, 16, 1454), (2, 2, 32, 16, 0, 133, 4, 1192)),
            128: ((2, 2, 32, 32, 0, 348, 16, 1494), (2, 2, 32, 16, 0, 175, 4, 1236)),
        },
        "grad_kv": {
            32: (
                (4, 2, 64, 128, 0, 800, 32, 2683),
                (2, 2, 16, 32, 0, 174, 4, 1020),
                (2, 2, 32, 32, 0, 388, 16, 1382),
            ),
            64: (
                (4, 2, 64, 128, 0, 963, 32, 3352),
                (2, 2, 16, 32, 0, 177, 4, 1052),
                (2, 2, 32, 32, 0, 477, 16, 1563),
            ),
            80: ((2, 2, 16, 32, 0, 206, 4, 1277), (2, 2, 32, 32, 0, 563, 16, 1971)),
            96: ((2, 2, 32, 32, 0, 569, 16, 1852),),
            128: ((2, 2, 32, 32, 0, 715, 16, 2194),),
        },
    },
}
# Tiles that spill with older ones: from which Triton on they are offered. {(target, kernel, head dim, warps, BLOCK_M, BLOCK_N)}
SINCE = {
    ("sm_80", "grad_kv", 128, 8, 16, 128): (3, 7),
    ("gfx942", "grad_kv", 32, 4, 64, 128): (3, 7),
    ("gfx942", "grad_kv", 64, 4, 64, 128): (3, 8),
}


def offered(kernel, target, D, version=VERSION):
    """The tiles of TILES for a head dim that has a list, less those that spill with this Triton."""
    found = []
    for tile in TILES[target][kernel][D]:
        warps, _, block_m, block_n, *_ = tile
        if version >= SINCE.get((target, kernel, D, warps, block_m, block_n), (0,)):
            found.append(tile)
    return found


def cost(kernel, target, D, tile, queries, keys):
    """Issue slots of a thread that `kernel` takes for a score; its own work is all counted, and padding is no score."""
    warps, _, block_m, block_n, _, loop, exponentials, outside = tile
    own, block_own, walked, block_walked = queries, block_m, keys, block_n
    if kernel == "grad_kv":  # a program owns keys and walks over queries
        own, block_own, walked, block_walked = keys, block_n, queries, block_m
    threads = warps * THREADS[target]
    operations = OPERATIONS[kernel] * D * block_m * block_n / threads
    products = operations * ISSUED[target] / PRODUCTS[target][block_own >= 64]
    step = max(loop, exponentials * ISSUED[target] / EXPONENTIALS[target], products)
    return triton.cdiv(own, block_own) * (outside + walked // block_walked * step) * threads / (own * walked)


def ordered(kernel, target, D, queries, keys):
    """(num_warps, num_stages, constants) of every tile offered for head dim D, the default first."""
    if D in HEAD_DIMS:
        tiles = sorted(offered(kernel, target, D), key=lambda tile: cost(kernel, target, D, tile, queries, keys))
    else:
        tiles = sorted(_uncounted(kernel, target, D), key=lambda tile: _padding(tile, queries, keys))
    return [
        (warps, stages, dict(BLOCK_M=block_m, BLOCK_N=block_n, EIGHTHS=eighths))
        for warps, stages, block_m, block_n, eighths, *_ in tiles
    ]


def _uncounted(kernel, target, D):
    """For a head dim without a list, largest first: some spill a few registers, which masks of columns take, too."""
    if kernel == "attention":
        own_first = [(8, 3, 128, 64), (4, 2, 64, 64) if D <= 96 else (8, 3, 64, 64), (2, 3, 32, 16)]
    elif target == "gfx942":
        own_first = [(4, 2, 64, 32), (2, 2, 32, 16)]
    elif D <= 96:
        own_first = [(8, 2, 128, 32), (4, 2, 64, 32), (2, 2, 32, 16)]
    else:
        own_first = [(8, 2, 128, 16), (8, 2, 32, 32)]
    if kernel == "grad_kv":
        return [(warps, stages, walked, own, 0) for warps, stages, own, walked in own_first]
    return [(warps, stages, own, walked, 0) for warps, stages, own, walked in own_first]


def _padding(tile, queries, keys):
    """0 where a quarter of the scores or less are padding, else how many there are for one that is not."""
    _, _, block_m, block_n, _ = tile
    scores = triton.cdiv(queries, block_m) * block_m * triton.cdiv(keys, block_n) * block_n / (queries * keys)
    return scores if scores > 1.25 else 0
