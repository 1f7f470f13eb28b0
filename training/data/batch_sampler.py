"""Which video comes when: a pure function of the seed and the position, so that a run resumes anywhere with no state kept.

Sample number p of a run is video ``permutation(seed, p // n)[p % n]`` in epoch ``p // n``: an endless stream in which a batch may
cross from one epoch to the next, so nothing is dropped and a data set may be smaller than a batch. The ranks of a distributed run
take consecutive micro-batches of each batch, so the data do not depend on how many there are.
"""

import numpy as np


class ResumableBatchSampler:
    """A batch sampler: for each micro-batch of this rank from ``first_step`` on, a list of (epoch, video number).

    batch: videos a step, over all ranks and micro-batches; it must divide evenly.
    """

    def __init__(self, num_videos, batch, *, seed, num_steps, first_step=0, accumulate=1, rank=0, world_size=1):
        micro_batches = accumulate * world_size
        if num_videos < 1 or batch < 1 or batch % micro_batches:
            raise ValueError(
                f"a batch of {batch} videos does not divide into {accumulate} micro-batch(es) on {world_size} process(es)"
            )
        self.num_videos, self.batch, self.seed = num_videos, batch, seed
        self.num_steps, self.first_step = num_steps, first_step
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size

    def __len__(self):
        return (self.num_steps - self.first_step) * self.accumulate

    def __iter__(self):
        epoch, permutation = -1, None
        size = self.batch // (self.accumulate * self.world_size)
        for step in range(self.first_step, self.num_steps):
            for part in range(self.accumulate):
                start = step * self.batch + (part * self.world_size + self.rank) * size
                keys = []
                for position in range(start, start + size):
                    if position // self.num_videos != epoch:
                        epoch = position // self.num_videos
                        permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_videos)
                    keys.append((epoch, int(permutation[position % self.num_videos])))
                yield keys
