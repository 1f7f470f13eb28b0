"""``stmae probe``: what frozen features are worth: nearest neighbours and a linear classifier on them."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from stmae import checkpoint
from stmae.models import VideoClassifier, VideoClassifierConfig

from .config import ProbeConfig
from .features import encode
from .listing import find_labelled_videos
from .run_folder import weights_file

Config = ProbeConfig
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # weight decays tried, on part of the training videos


def run(config):
    """Prints the accuracies and returns them as a dict."""
    train, test = find_labelled_videos(config.data), find_labelled_videos(config.test_data)
    model = None
    if config.random_weights:
        torch.manual_seed(config.seed)
        shape = checkpoint.load_classifier(weights_file(config.checkpoint)).config
        model = VideoClassifier(VideoClassifierConfig.from_dict(shape.to_dict()))
    x, y, _, left_out = encode(config.checkpoint, train, config, model=model)
    test_x, test_y, _, test_left_out = encode(config.checkpoint, test, config, model=model)
    for error in (*left_out, *test_left_out):
        print(f"left out: {error}")
    if not len(y) or not len(test_y):
        raise ValueError("a probe needs at least one usable video in data and in test_data")
    classes = int(max(y.max(), test_y.max())) + 1
    results = {
        "videos": len(y),
        "test_videos": len(test_y),
        "classes": classes,
        "knn": knn(x, y, test_x, test_y, classes, config.neighbours),
        "linear": linear(x, y, test_x, test_y, classes, config.seed),
        "chance": (torch.bincount(test_y).max() / len(test_y)).item(),
    }
    print(
        f"{results['videos']} videos, tested on {results['test_videos']}: {config.neighbours} nearest neighbours "
        f"{results['knn']:.1%}, linear {results['linear']:.1%}, always the commonest class {results['chance']:.1%}"
    )
    if config.output:
        Path(config.output).write_text(json.dumps(results, indent=1) + "\n")
    return results


def knn(x, y, test_x, test_y, classes, neighbours):
    """Accuracy of a vote of the nearest by cosine, each weighted exp(similarity / 0.07) (Wu et al., 2018, arXiv 1805.01978).

    Features are centred by the training videos' mean first: what all videos share would drown what tells them apart.
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
    held, rest = shuffled[: len(y) // 5], shuffled[len(y) // 5 :]

    def right(weight, features, labels):
        return (features @ weight[:-1] + weight[-1]).argmax(1).eq(labels).float().mean().item()

    penalty = PENALTIES[len(PENALTIES) // 2]
    if len(held) >= 2:
        penalty = max(PENALTIES, key=lambda p: right(logistic_regression(x[rest], y[rest], classes, p), x[held], y[held]))
    return right(logistic_regression(x, y, classes, penalty), test_x, test_y)


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
