"""Which video comes when: a pure function of the seed and the position, so that a run resumes anywhere with no state kept.

Of a single list sample number p of a run is video ``permutation(seed, p // n)[p % n]`` in epoch ``p // n``: an endless stream in
which a batch may cross from one epoch to the next, so nothing is dropped and a data set may be smaller than a batch. The ranks of
a distributed run take consecutive micro-batches of each batch, so the data do not depend on how many there are.

Of several lists with weights an epoch is as many samples as the lists have videos together, and each list gives its part of them:
the same number in every epoch, weight / sum of weights of it, rounded so that they add up. Where in the epoch they come is a
permutation by seed and epoch. The samples of one list, in their order over all epochs, are its own endless stream: every video of
it comes once before any comes again, in another order each time.
"""

import numpy as np

from ..config.wording import counted


class VideoOrder:
    """The endless stream of samples: ``order[p]``, p >= 0, is (epoch, video number) of sample p.

    lists: [(videos, weight)], one or more, their videos numbered on from one list to the next. ``epoch`` in what comes out counts
    the passes over the video's own list, so that no two samples are the same; ``len(order)`` is the samples of an epoch of all.

    Raises ValueError where a list has so little weight that it would give no sample in an epoch.
    """

    def __init__(self, lists, seed):
        self.lists, self.seed = [(int(videos), float(weight)) for videos, weight in lists], seed
        self.quotas = samples_an_epoch(self.lists)
        self._epoch, self._keys = None, None

    def __len__(self):
        return sum(videos for videos, _ in self.lists)

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self))
        if epoch != self._epoch:
            self._epoch, self._keys = epoch, self.of_epoch(epoch)
        passes, numbers = self._keys
        return int(passes[place]), int(numbers[place])

    def of_epoch(self, epoch):
        """(passes, video numbers) of its samples, int64 [len(self)] each."""
        passes, numbers = np.empty((2, len(self)), np.int64)
        sources = np.zeros(len(self), np.int64)
        if len(self.lists) > 1:
            rng = np.random.default_rng([self.seed, epoch, 0, 1])  # another stream than those of the permutations below
            sources = rng.permutation(np.repeat(np.arange(len(self.lists)), self.quotas))
        start = 0
        for index, ((videos, _), quota) in enumerate(zip(self.lists, self.quotas)):
            of_list = np.arange(epoch * quota, (epoch + 1) * quota)  # positions in the list's own stream
            order = [
                np.random.default_rng([self.seed, number, *[index] * (index > 0)]).permutation(videos)
                for number in range(of_list[0] // videos, of_list[-1] // videos + 1)
            ]
            passes[sources == index] = of_list // videos
            numbers[sources == index] = start + np.concatenate(order)[of_list - of_list[0] // videos * videos]
            start += videos
        return passes, numbers


def samples_an_epoch(lists):
    """How many samples each of ``lists``, [(videos, weight)], gives in an epoch: the largest remainders are rounded up."""
    total, weights = sum(videos for videos, _ in lists), sum(weight for _, weight in lists)
    exact = [total * weight / weights for _, weight in lists]
    quotas = [int(value) for value in exact]
    by_remainder = sorted(range(len(lists)), key=lambda index: quotas[index] - exact[index])
    for index in by_remainder[: total - sum(quotas)]:
        quotas[index] += 1
    if 0 in quotas:
        index = quotas.index(0)
        raise ValueError(
            f"list {index + 1} of {len(lists)} gives no sample in an epoch of {total}, with {lists[index][1] / weights:.2g} of "
            "the weight: expected more"
        )
    return quotas


class ResumableBatchSampler:
    """A batch sampler: for each micro-batch of this rank from ``first_step`` on, a list of (epoch, video number).

    batch: videos a step, over all ranks and micro-batches; it must divide evenly.
    lists: [(videos, weight)] where the ``num_videos`` are those of several lists, see VideoOrder; None: of one.
    """

    def __init__(self, num_videos, batch, *, seed, num_steps, first_step=0, accumulate=1, rank=0, world_size=1, lists=None):
        micro_batches = accumulate * world_size
        if num_videos < 1 or batch < 1 or batch % micro_batches:
            raise ValueError(
                f"a batch of {counted(batch, 'video')} does not divide into {counted(accumulate, 'micro-batch')} on "
                f"{counted(world_size, 'process')}"
            )
        lists = lists or [(num_videos, 1.0)]
        if sum(videos for videos, _ in lists) != num_videos:
            raise ValueError(f"expected lists of {num_videos} videos together, got {lists}")
        self.order = VideoOrder(lists, seed)
        self.num_videos, self.batch, self.seed = num_videos, batch, seed
        self.num_steps, self.first_step = num_steps, first_step
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.videos = batch // micro_batches  # of a micro-batch

    def __len__(self):
        return (self.num_steps - self.first_step) * self.accumulate

    def __iter__(self):
        for step in range(self.first_step, self.num_steps):
            for part in range(self.accumulate):
                start = step * self.batch + (part * self.world_size + self.rank) * self.videos
                yield [self.order[position] for position in range(start, start + self.videos)]
