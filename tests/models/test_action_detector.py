"""RoIAlign against its definition, and the detector that is built on it."""

import math

import pytest
import torch

from stmae import checkpoint
from stmae.models import ActionDetector, ActionDetectorConfig, MaskedAutoencoder, MaskedAutoencoderConfig
from stmae.models.roi_align import roi_align

SIZES = {"image_size": (32, 48), "num_frames": 4, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}


def sample(plane, y, x):
    """Bilinear, as the definition has it: 0 beyond a pixel outside, the edge's value nearer than that."""
    height, width = len(plane), len(plane[0])
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[top][left] * (1 - (x - left)) + plane[top][right] * (x - left)
    lower = plane[bottom][left] * (1 - (x - left)) + plane[bottom][right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def defined(features, boxes, clip, size):
    """Sample by sample, in Python's float64."""
    height, width = features.shape[2:]
    out = torch.zeros(len(boxes), features.shape[1], size, size, dtype=torch.float64)
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        top, left = y1 * height - 0.5, x1 * width - 0.5
        h, w = (y2 - y1) * height / size, (x2 - x1) * width / size
        down, across = math.ceil(h), math.ceil(w)
        for d, plane in enumerate(features[clip[k]].tolist()):
            for i in range(size):
                for j in range(size):
                    values = [
                        sample(plane, top + h * (i + (a + 0.5) / down), left + w * (j + (b + 0.5) / across))
                        for a in range(down)
                        for b in range(across)
                    ]
                    out[k, d, i, j] = sum(values) / max(1, len(values))
    return out


BOXES = [[0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], [0.5, 0.5, 0.52, 0.9], [-0.3, 0.2, 0.4, 1.4], [0.3, 0.3, 0.3, 0.3], [1.5, 1.5, 2, 2]]


@pytest.mark.parametrize("size, shape", [(7, (14, 14)), (2, (9, 5)), (1, (3, 4)), (3, (1, 6))])
def test_roi_align_is_its_definition(size, shape):
    features = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes, clip = torch.tensor(BOXES, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 0, 1])
    out = roi_align(features, boxes, clip, size)
    torch.testing.assert_close(out, defined(features, boxes, clip, size), rtol=1e-12, atol=1e-12)
    assert not out[4].any() and not out[5].any()  # no area; beyond the map
    rounded = roi_align(features.float(), boxes.float(), clip, size)
    torch.testing.assert_close(rounded.double(), out, rtol=0, atol=2e-5)


def test_roi_align_of_a_plane_is_the_plane_and_has_gradients():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    features = torch.stack([rows, columns])[None].double().requires_grad_()
    out = roi_align(features, torch.tensor([[0.25, 0.25, 0.75, 0.75]]).double(), torch.tensor([0]), 2)
    # The cells' centres: pixel i has its centre at i + 0.5, the box lies from 2 to 6.
    torch.testing.assert_close(out[0, 0], torch.tensor([[2.5, 2.5], [4.5, 4.5]]).double())
    torch.testing.assert_close(out[0, 1], torch.tensor([[2.5, 4.5], [2.5, 4.5]]).double())
    out.sum().backward()
    torch.testing.assert_close(features.grad.sum(), torch.tensor(8.0).double())  # a mean of samples each
    assert roi_align(features, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 7).shape == (0, 2, 7, 7)


def test_roi_align_is_torchvisions():
    ops = pytest.importorskip("torchvision.ops", exc_type=(ImportError, RuntimeError))
    features = torch.randn(2, 3, 14, 14, dtype=torch.float64)
    boxes, clip = torch.tensor(BOXES[:4], dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    theirs = ops.roi_align(features, torch.cat([clip[:, None].double(), boxes * 14], 1), 7, sampling_ratio=0, aligned=True)
    torch.testing.assert_close(roi_align(features, boxes, clip, 7), theirs)


@pytest.mark.parametrize(
    "operands, message",
    [
        ((torch.zeros(3, 4, 4), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 7), "expected features"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64), 7), "expected boxes"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64), 7), r"expected clip \[2\] int64"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(1, 4), torch.zeros(1), 7), r"expected clip \[1\] int64"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 0), "expected size of 1 or more"),
    ],
)
def test_roi_align_refuses_other_operands(operands, message):
    with pytest.raises(ValueError, match=f"roi_align: {message}"):
        roi_align(*operands)


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return ActionDetector(ActionDetectorConfig(**SIZES, num_classes=5, roi_size=3)).eval()


def test_the_detector_is_what_its_description_says(detector):
    """Norm, mean over time, RoIAlign, maximum, linear."""
    video = torch.randint(0, 256, (2, 3, 4, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes, clip = torch.tensor(BOXES[:3]), torch.tensor([1, 0, 1])
    tokens = detector.encoder(video)[:, 1:].view(2, 2, 4, 6, 32)
    picked = defined(tokens.mean(1).permute(0, 3, 1, 2).double(), boxes.double(), clip, 3).amax((2, 3))
    expected = picked @ detector.head.weight.double().T + detector.head.bias.double()
    torch.testing.assert_close(detector(video, boxes, clip).double(), expected, rtol=1e-4, atol=1e-4)
    detector.backend = "reference"
    torch.testing.assert_close(detector(video, boxes, clip).double(), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert detector(video, boxes, clip).dtype == torch.float32
    assert detector(video, boxes[:0], clip[:0]).shape == (0, 5)


def test_a_detector_is_made_saved_and_read(detector, tmp_path):
    torch.manual_seed(1)
    autoencoder = MaskedAutoencoder(MaskedAutoencoderConfig(**SIZES, decoder_width=16, decoder_depth=1, decoder_num_heads=1))
    checkpoint.save(autoencoder, tmp_path / "pretrained.safetensors")
    made = checkpoint.load_detector(tmp_path / "pretrained.safetensors", num_classes=80, drop_path=0.2, num_frames=8)
    assert made.config.num_classes == 80 and made.config.grid == (4, 4, 6) and made.config.roi_size == 7
    assert torch.equal(made.encoder.blocks[0].fc1.weight, autoencoder.encoder.blocks[0].fc1.weight)
    checkpoint.save(detector, tmp_path / "detector.safetensors")
    again = checkpoint.load(tmp_path / "detector.safetensors")
    assert again.config == detector.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in detector.state_dict().items())
    other = checkpoint.load_detector(tmp_path / "detector.safetensors", num_classes=7)
    assert other.head.weight.shape == (7, 32)
    detector.save_pretrained(tmp_path / "shared")
    assert ActionDetector.from_pretrained(tmp_path / "shared").config == detector.config
    with pytest.raises(ValueError, match="holds an ActionDetector"):
        checkpoint.load_classifier(tmp_path / "detector.safetensors")
