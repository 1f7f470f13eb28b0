"""What frozen features are worth: nearest neighbours, a linear and an attentive classifier on them."""

import torch
import torch.nn.functional as F
from torch import nn

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # weight decays of the linear probe tried, on part of the training videos
RATES = (3e-4, 1e-3, 3e-3)  # learning rates of the attentive probe tried, on the same
EPOCHS, STEPS, BATCH = 20, 200, 64  # of the attentive probe's training: passes over the videos, but at least that many steps


def knn(x, y, test_x, test_y, classes, neighbours):
    """Accuracy of k nearest neighbours by cosine, each weighted exp(similarity / 0.07) (Wu et al., 2018, arXiv 1805.01978).

    Features are centred by the training videos' mean first: what all videos have in common would hide the differences between
    them.
    """
    mean = x.mean(0)
    x, test_x = F.normalize(x - mean, dim=1), F.normalize(test_x - mean, dim=1)
    similarity, nearest = (test_x @ x.T).topk(min(neighbours, len(x)), dim=1)
    votes = torch.zeros(len(test_x), classes).scatter_add_(1, y[nearest], (similarity / 0.07).exp())
    return (votes.argmax(1) == test_y).float().mean().item()


def linear(x, y, test_x, test_y, classes, seed):
    """Accuracy of logistic regression on standardised features.

    Its weight decay is the best of PENALTIES on a fifth of the training videos, never on the test.
    """
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x, test_x = (x - mean) / std, (test_x - mean) / std
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    validation, rest = shuffled[: len(y) // 5], shuffled[len(y) // 5 :]

    def accuracy_of(weight, features, labels):
        return (features @ weight[:-1] + weight[-1]).argmax(1).eq(labels).float().mean().item()

    penalty = PENALTIES[len(PENALTIES) // 2]
    if len(validation) >= 2:

        def validated(penalty):
            weight = logistic_regression(x[rest], y[rest], classes, penalty)
            return accuracy_of(weight, x[validation], y[validation])

        penalty = max(PENALTIES, key=validated)
    return accuracy_of(logistic_regression(x, y, classes, penalty), test_x, test_y)


def logistic_regression(x, y, classes, penalty):
    """Weights [D + 1, classes], the bias last, that minimise cross entropy + penalty / 2 * |weights|^2."""
    weight = torch.zeros(x.shape[1] + 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight[:-1] + weight[-1], y) + penalty / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


class AttentiveClassifier(nn.Module):
    """Cross-attention of a learnt query over tokens, then a linear classifier (Bardes et al. 2024, arXiv 2404.08471: V-JEPA's
    attentive probe, here without the block around its attention).

    Each head's query is multiplied into the key projection first, and its attention averages the tokens before the value
    projection: the same result for the work of two products with ``heads`` rows instead of two with ``width``.
    """

    def __init__(self, width, classes, heads):
        super().__init__()
        self.query = nn.Parameter(torch.randn(heads, width // heads))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens):  # [B, N, D] -> [B, classes]
        heads, dim = self.query.shape
        query_weight = torch.einsum("hd,hdw->hw", self.query, self.key.weight.unflatten(0, (heads, dim))) * dim**-0.5
        weights = (tokens @ query_weight.T).softmax(dim=1)  # [B, N, heads]
        means = weights.transpose(1, 2) @ tokens  # [B, heads, D]
        values = torch.einsum("bhw,hdw->bhd", means, self.value.weight.unflatten(0, (heads, dim))).flatten(1) + self.value.bias
        return self.head(self.norm(values))


def attentive(tokens, y, test_tokens, test_y, classes, seed, device):
    """Accuracy of an AttentiveClassifier on tokens [videos, N, D], standardised.

    Its learning rate is the best of RATES on a fifth of the training videos, never on the test. A function of ``seed``: PyTorch's
    global random state is left alone.
    """
    mean = sum(video.float().mean(0) for video in tokens) / len(tokens)
    variance = sum((video.float() - mean).square().mean(0) for video in tokens) / len(tokens)
    scale = (mean.to(device), variance.sqrt().clamp(min=1e-6).to(device))
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    validation, rest = shuffled[: len(y) // 5], shuffled[len(y) // 5 :]

    def trained(rate, numbers):
        return train_attentive(tokens, y, numbers, classes, rate, scale, seed, device)

    @torch.no_grad()
    def accuracy_of(model, tokens, labels):
        predicted = torch.cat([model(standardised(part, scale, device)).argmax(1).cpu() for part in tokens.split(BATCH)])
        return (predicted == labels).float().mean().item()

    rate = RATES[len(RATES) // 2]
    if len(validation) >= 2:
        rate = max(RATES, key=lambda rate: accuracy_of(trained(rate, rest), tokens[validation], y[validation]))
    return accuracy_of(trained(rate, torch.arange(len(y))), test_tokens, test_y)


def train_attentive(tokens, y, numbers, classes, rate, scale, seed, device):
    """An AttentiveClassifier trained on the videos ``numbers`` with AdamW and a cosine from ``rate`` to 0."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(BATCH, len(numbers))
    width = tokens.shape[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AttentiveClassifier(width, classes, heads=max(h for h in range(1, max(1, width // 64) + 1) if width % h == 0))
    model.to(device)
    steps = max(STEPS, EPOCHS * len(numbers) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.zeros(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, numbers[torch.randperm(len(numbers), generator=generator)]])
        chosen, order = order[:batch], order[batch:]
        loss = F.cross_entropy(model(standardised(tokens[chosen], scale, device)), y[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def standardised(tokens, scale, device):
    mean, deviation = scale
    return (tokens.to(device).float() - mean) / deviation
