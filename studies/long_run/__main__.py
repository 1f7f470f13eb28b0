"""The study of rounding in a long run: 10,000 steps of a tiny model on the ops, on the reference, and on the reference in another
order.

    python -m studies.long_run         # from the repository's root; prints the table of docs/robustness.md

Two trainings whose sums are rounded in another way drift apart, however right both are: each step's difference is the next one's
start. So the ops are right in the long run where they are no further from the reference than the reference is from itself with
every batch in reverse order, which changes only the order in which gradients are summed over clips. All three have the same
weights, clips and masks to begin with. On one core it takes ten minutes; stopped, the same command continues.
"""

import argparse
from pathlib import Path

import torch

from stmae.masking import sample_noise
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig

CONFIG = MaskedAutoencoderConfig(
    image_size=32,
    num_frames=4,
    patch_size=8,
    width=64,
    depth=2,
    num_heads=2,
    decoder_width=32,
    decoder_depth=1,
    decoder_num_heads=1,
)
BATCH, SPAN = 8, 1000  # clips of a step; steps whose mean loss is a row of the table
RUNS = {"ops": ("ops", False), "reference": ("reference", False), "reference, reversed": ("reference", True)}


def clips(step):
    """uint8 [BATCH, 3, 4, 32, 32]: discs that move over a coloured ground, drawn from the step's number."""
    generator = torch.Generator().manual_seed(step)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    grid = torch.arange(32.0)
    time_of_frame = torch.arange(4.0)
    start, speed, radius = 32 * uniform(BATCH, 2, 1), 6 * uniform(BATCH, 2, 1) - 3, 4 + 6 * uniform(BATCH, 1, 1, 1)
    y, x = (start + speed * time_of_frame).unbind(1)  # [BATCH, 4] each
    distance = (grid[:, None] - y[..., None, None]) ** 2 + (grid - x[..., None, None]) ** 2  # [BATCH, 4, 32, 32]
    inside = (distance < radius**2)[:, None]
    disc, ground = uniform(BATCH, 3, 1, 1, 1), uniform(BATCH, 3, 1, 1, 1)
    noise = 0.1 * uniform(BATCH, 3, 4, 32, 32)
    return (255 * (0.9 * torch.where(inside, disc, ground) + noise)).to(torch.uint8)


class Training:
    def __init__(self, backend, reverse, steps):
        torch.manual_seed(0)
        self.model, self.reverse, self.steps = MaskedAutoencoder(CONFIG), reverse, steps
        self.model.backend = backend
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
        self.losses = []

    def step(self, number, video, noise):
        if self.reverse:
            video, noise = video.flip(0), noise.flip(0)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (number + 1) / 200) * (1 - number / self.steps)
        loss = self.model(video, noise=noise).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def weights(self):
        return torch.cat([value.detach().flatten().double() for value in self.model.parameters()])


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.long_run", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--work", default="runs/long_run", help="where it continues from (default: %(default)s)")
    arguments = parser.parse_args()
    steps, span, file = arguments.steps, min(SPAN, arguments.steps), Path(arguments.work) / f"state-{arguments.steps}.pt"
    trainings = {name: Training(*options, steps) for name, options in RUNS.items()}
    first, rows = 0, []
    if file.exists():
        state = torch.load(file, weights_only=True)
        first, rows = state["step"], state["rows"]
        for name, training in trainings.items():
            training.load(state["trainings"][name])
    file.parent.mkdir(parents=True, exist_ok=True)
    for number in range(first, steps):
        video = clips(number)
        noise = sample_noise("random", BATCH, CONFIG.grid, CONFIG.mask_ratio, generator=torch.Generator().manual_seed(number))
        for training in trainings.values():
            training.step(number, video, noise)
        if (number + 1) % span == 0:
            rows.append([str(number + 1), *differences(trainings, trainings["reference"], span)])
            states = {name: training.state() for name, training in trainings.items()}
            torch.save({"step": number + 1, "rows": rows, "trainings": states}, file)
            print(f"step {number + 1} of {steps}", flush=True)
    print("\n| steps | mean loss: reference | ops | reversed | loss: ops | reversed | weights: ops | reversed |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def differences(trainings, reference, span):
    """The last ``span`` steps' mean losses, then the largest difference of a step's loss from the reference's, relative, and how
    far the weights are from its, relative to the length of theirs: of the ops and of the reversed reference."""
    last = {name: torch.tensor(training.losses[-span:], dtype=torch.float64) for name, training in trainings.items()}
    others, exact, weights = ("ops", "reference, reversed"), last["reference"], reference.weights()
    means = [f"{last[name].mean():.5f}" for name in ("reference", *others)]
    losses = [f"{((last[name] - exact).abs() / exact).max():.1e}" for name in others]
    lengths = [f"{(trainings[name].weights() - weights).norm() / weights.norm():.1e}" for name in others]
    return [*means, *losses, *lengths]


if __name__ == "__main__":
    main()
