"""Which clips a packed batch holds: a pure function of the seed and the step, as in ``batch_sampler``, for clips of any shapes.

A step takes the next samples of the order: as many as there are videos in a batch, or as fit a budget of tokens. They are then
divided between micro-batches and processes, the largest first and each to where least is, so that all compute about as much. What
a step holds does not depend on how many there are to share it.
"""

import functools
import math

import numpy as np

from ..config.wording import counted


class PackedOrder:
    """The samples of each step.

    order: a VideoOrder. shapes: a ClipShapes. pictures: bool [videos], which are images. batch: samples a step; or tokens: the
    most that a step's clips cost together (``ClipShapes.draw``).
    """

    def __init__(self, order, shapes, pictures, *, seed, batch=None, tokens=None):
        self.order, self.shapes, self.pictures, self.seed = order, shapes, np.asarray(pictures, bool), seed
        self.batch, self.tokens = batch, tokens
        if tokens is not None and tokens < shapes.most_cost:
            raise ValueError(f"optimizer.tokens: expected {shapes.most_cost} or more, {shapes.what_costs_most}, got {tokens}")
        self._starts = [0]
        self._epoch = functools.lru_cache(maxsize=3)(self._draw)

    def _draw(self, epoch):
        """(passes, numbers, (frames, area, cost) of each clip [samples, repeats, 3], costs, sums of costs) of an epoch's
        samples."""
        passes, numbers = self.order.of_epoch(epoch)
        drawn = np.stack(self.shapes.draw(self.seed, epoch, self.pictures[numbers]), axis=-1)
        costs = drawn[..., 2].sum(axis=1)
        return passes, numbers, drawn, costs, costs.cumsum()

    def start(self, step):
        """The position of the first sample of ``step``."""
        if self.tokens is None:
            return step * self.batch
        while len(self._starts) <= step:
            self._starts.append(self._next(self._starts[-1]))
        return self._starts[step]

    def _next(self, start):
        """The first position that does not fit together with those from ``start`` on."""
        position, left = start, self.tokens
        while True:
            epoch, place = divmod(position, len(self.order))
            sums = self._epoch(epoch)[-1]
            before = int(sums[place - 1]) if place else 0
            end = int(np.searchsorted(sums, before + left, side="right"))
            if end < len(sums):
                return epoch * len(self.order) + end
            position, left = (epoch + 1) * len(self.order), left - (int(sums[-1]) - before)

    def steps(self, samples):
        """How many steps hold the first ``samples``."""
        if self.tokens is None:
            return max(1, math.ceil(samples / self.batch - 1e-9))
        step = max(0, len(self._starts) - 1)
        while self.start(step) < samples:
            step += 1
        while step > 1 and self.start(step - 1) >= samples:
            step -= 1
        return max(1, step)

    def most_cost(self, steps):
        """What the clips of one of the first ``steps`` steps cost together, at most."""
        if self.tokens is not None:
            return self.tokens
        sums, before, ends = [0], 0, self.batch * np.arange(1, steps + 1)
        for epoch in range(-(-steps * self.batch // len(self.order))):
            own = self._epoch(epoch)[-1]
            places = ends[(ends > epoch * len(own)) & (ends <= (epoch + 1) * len(own))] - epoch * len(own)
            sums.extend((before + own[places - 1]).tolist())
            before += int(own[-1])
        return int(np.diff(sums).max())

    @property
    def mean_cost(self):
        """Of a sample, as in the first epoch."""
        return self._epoch(0)[-1][-1] / len(self.order)

    def __getitem__(self, step):
        """The samples of ``step``: ([(pass, video number, ((frames, area, cost) of each clip))], costs)."""
        keys, costs = [], []
        for position in range(self.start(step), self.start(step + 1)):
            epoch, place = divmod(position, len(self.order))
            passes, numbers, drawn, own, _ = self._epoch(epoch)
            keys.append((int(passes[place]), int(numbers[place]), tuple(map(tuple, drawn[place].tolist()))))
            costs.append(int(own[place]))
        return keys, costs


class PackedBatchSampler:
    """A batch sampler: for each micro-batch of this rank from ``first_step`` on, a list of (epoch, video number, shapes).

    order: a PackedOrder. Raises ValueError where a batch may be too small to divide.
    """

    def __init__(self, order, *, num_steps, first_step=0, accumulate=1, rank=0, world_size=1):
        self.order, self.num_steps, self.first_step = order, num_steps, first_step
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        shapes, parts = order.shapes, accumulate * world_size
        where = f"{counted(accumulate, 'micro-batch')} on {counted(world_size, 'process')}"
        if order.tokens is None and order.batch < parts:
            raise ValueError(f"a batch of {counted(order.batch, 'video')} does not divide into {where}")
        if order.tokens is not None and order.tokens < parts * shapes.most_cost:
            raise ValueError(
                f"a budget of {counted(order.tokens, 'token')} does not divide into {where}: expected "
                f"{parts * shapes.most_cost} or more, {shapes.most_cost} for each, {shapes.what_costs_most}"
            )
        self.capacity = capacity(shapes, order.most_cost(num_steps), parts)
        mean = order.tokens / order.mean_cost if order.tokens else order.batch
        self.videos = max(1, round(mean / parts))  # of a micro-batch, on average

    def __len__(self):
        return (self.num_steps - self.first_step) * self.accumulate

    def __iter__(self):
        for step in range(self.first_step, self.num_steps):
            keys, costs = self.order[step]
            parts = divide(costs, self.accumulate * self.world_size)
            for part in range(self.accumulate):
                yield [keys[index] for index in parts[part * self.world_size + self.rank]]


def capacity(shapes, cost, parts):
    """How many tokens N a micro-batch has at most, one of the ``parts`` of a step of this ``cost``: where each sample goes to
    where least is, the one that comes last to the fullest part came to a mean of the others, or less."""
    return math.ceil((cost / parts + shapes.most_cost * (1 - 1 / parts)) * shapes.tokens_per_cost)


def divide(costs, parts):
    """Indices of ``costs`` in ``parts`` lists whose sums differ by one cost at most: the highest first, each to the least sum."""
    sums, members = [0] * parts, [[] for _ in range(parts)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        part = min(range(parts), key=sums.__getitem__)
        sums[part] += costs[index]
        members[part].append(index)
    return [sorted(part) for part in members]
