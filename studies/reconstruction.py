"""A reconstruction worth looking at: a longer run than the demonstration's on more clips, with two targets side by side.

    python -m studies.reconstruction --photos FOLDER...     # writes docs/longer-run.png, .gif and .json

The demonstration's six training clips are too few to learn from what pictures look like. Here they are joined by short videos
made of photographs (JPEG, searched recursively): a camera pans, zooms and turns over one, and in half of them a piece of another
moves in front. Debian has photographs in mate-backgrounds, ukui-wallpapers, lomiri-wallpapers-16.04 and -20.04, in
/usr/share/backgrounds. The held-out clips are those of the demonstration.

One model predicts pixels: everything in its picture is its own. The other goes on from its weights for a fifth of the steps and
predicts normalised patches, as the paper does: its picture takes mean and contrast of each patch from the original. Stopped by a
signal, the same command continues.
"""

import argparse
import datetime
import json
import math
import resource
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from stmae import checkpoint
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig
from stmae.training.config import ClipConfig, OptimizerConfig, PretrainConfig, PretrainRunConfig
from stmae.training.data.dataset import ViewClips, as_video
from stmae.training.data.video_list import find_videos
from stmae.training.evaluation.pictures import to_uint8
from stmae.training.tasks.pretraining import pretrain

from .motion.experiments import initialize_sincos
from .processor import processor

ASSETS = Path(__file__).parents[1] / "training" / "assets"
TARGETS = {"pixels": "all of it predicted", "normalized_pixels": "mean and contrast from the original"}
FIRST = "pixels"  # trained from random weights
SIZE, FRAMES = 128, 40  # of a made video, pixels and frames
SHORT_SIDE = 320  # of a photograph that the camera moves over, pixels
VIDEOS = 24  # made of each photograph
SHIPPED = 40  # times that each of the demonstration's clips is listed
BATCH, REPEATS = 4, 4  # videos of a step, and clips of each
LOSS_CLIPS = 3  # of each held-out video

MODEL = MaskedAutoencoderConfig(
    image_size=96,
    num_frames=16,
    patch_size=8,
    tubelet_size=2,
    width=192,
    depth=6,
    num_heads=6,
    decoder_width=96,
    decoder_depth=2,
    decoder_num_heads=3,
    class_token=False,
    mask_ratio=0.9,
)


def load_photographs(folders):
    """float32 [3, h, w] in [0, 255] each, the shorter side SHORT_SIDE pixels, in the order of their paths."""
    paths = sorted(path for folder in folders for path in Path(folder).rglob("*.jpg"))
    if len(paths) < 2:
        raise ValueError(f"photos: expected at least two .jpg files in {', '.join(map(str, folders))}, got {len(paths)}")
    photographs = []
    for path in paths:
        with Image.open(path) as image:
            image.draft("RGB", (2 * SHORT_SIDE, 2 * SHORT_SIDE))  # decodes a large one at a fraction of its size
            scale = SHORT_SIDE / min(image.size)
            image = image.convert("RGB").resize([round(scale * side) for side in image.size], Image.Resampling.BOX)
        photographs.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float())
    return photographs


def make_clip(photograph, other, generator):
    """uint8 [FRAMES, SIZE, SIZE, 3]: a camera over ``photograph``, and, half of the times, a piece of ``other`` before it."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    clip = _camera(photograph, uniform)
    if torch.rand((), generator=generator) < 0.5:
        time = torch.linspace(-1, 1, FRAMES)
        x, y = (uniform(-0.6, 0.6, 1) + time * uniform(-0.8, 0.8, 1) for _ in range(2))
        grid = torch.linspace(-1, 1, SIZE)
        wide, high = uniform(0.2, 0.6, 2)
        distance = ((grid - x[:, None]) / wide)[:, None] ** 2 + ((grid - y[:, None]) / high)[:, :, None] ** 2
        alpha = torch.sigmoid(12 * (1 - distance))[:, None]
        clip = torch.lerp(clip, _camera(other, uniform), alpha)
    return clip.permute(0, 2, 3, 1).round().to(torch.uint8)


def _camera(photograph, uniform):
    """[FRAMES, 3, SIZE, SIZE]: the view of a camera that moves evenly, zooms and turns."""
    height, width = photograph.shape[1:]
    time = torch.linspace(-0.5, 0.5, FRAMES)
    scale = (uniform(math.log(0.8), math.log(2.0), 1) + time * uniform(-0.4, 0.4, 1)).exp()  # canvas pixels of a frame pixel
    angle = uniform(-0.3, 0.3, 1) + time * uniform(-0.5, 0.5, 1)
    reach = scale.max() * SIZE / 2
    x, y = (
        uniform(min(reach, side / 2), max(side - reach, side / 2), 1) + time * uniform(-90.0, 90.0, 1) for side in (width, height)
    )
    pixels = torch.arange(SIZE) - (SIZE - 1) / 2
    down, right = torch.meshgrid(pixels, pixels, indexing="ij")
    cosine, sine = ((scale * f(angle))[:, None, None] for f in (torch.cos, torch.sin))
    seen = torch.stack([x[:, None, None] + cosine * right - sine * down, y[:, None, None] + sine * right + cosine * down], -1)
    seen = 2 * seen / torch.tensor([width, height]) - 1
    return F.grid_sample(photograph.expand(FRAMES, -1, -1, -1), seen, padding_mode="reflection", align_corners=False)


def write_video(path, frames):
    """An H.264 file of uint8 frames [n, h, w, 3]."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"crf": "18", "preset": "veryfast", "g": "8", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))


def make_videos(photographs, folder, count, seed=0):
    """``count`` videos of each photograph in ``folder``; the list of them and of the demonstration's clips, ``train.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, photograph in enumerate(photographs):
        for take in range(count):
            path = folder / f"{number:02}-{take:02}.mp4"
            if not path.exists():
                generator = torch.Generator().manual_seed((seed * 1000 + number) * 1000 + take)
                other = torch.randint(1, len(photographs), (), generator=generator).item()
                frames = make_clip(photograph, photographs[(number + other) % len(photographs)], generator).numpy()
                unfinished = path.with_suffix(".part.mp4")
                write_video(unfinished, frames)
                unfinished.rename(path)
            listed.append(path.resolve())
    shipped = [ASSETS / line for line in (ASSETS / "train.txt").read_text().splitlines() if not line.startswith("#")]
    (folder / "train.txt").write_text("".join(f"{path}\n" for path in listed + SHIPPED * shipped))
    return folder / "train.txt"


def config(target, videos, work, steps):
    """The PretrainConfig of one of the two runs; ``steps``: of the first one."""
    first = target == FIRST
    steps = steps if first else steps // 5
    passes = steps * BATCH / len(find_videos(videos))
    return PretrainConfig(
        data=str(videos),
        held_out=str(ASSETS / "held_out.txt"),
        output=str(work / target),
        init=str(start(work) if first else work / FIRST),
        clips=ClipConfig(stride=2, repeats=REPEATS, scale=(0.3, 1.0)),
        model=MODEL.replace(target=target),
        optimizer=OptimizerConfig(
            batch=BATCH,
            base_batch=BATCH,
            base_lr=2e-3 if first else 1e-3,
            epochs=passes * REPEATS,
            warmup_epochs=passes * REPEATS / 10,
            clip_grad=1.0,
        ),
        run=PretrainRunConfig(workers=0, save_every=100, evaluate_every=100, log_every=20, tensorboard=False),
    )


def start(work):
    """The weights that the first run starts from: random but for the positions, which are learned from sines and cosines on.
    From small random positions learning is slower, as in the study of motion."""
    file = work / "start.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        model = MaskedAutoencoder(MODEL.replace(target=FIRST))
        for position in (model.encoder.position, model.decoder.position):
            initialize_sincos(position)
        checkpoint.save(model, file)
    return file


def train(settings):
    """Trains, or continues. Returns (the TrainState, CPU seconds of all parts of the run, which are kept beside its folder)."""
    file = Path(settings.output + ".cost.json")
    before = json.loads(file.read_text()) if file.exists() else {"step": 0, "cpu_seconds": 0.0}
    start = _cpu_seconds()
    state = pretrain(settings)
    if state.step == before["step"]:
        return state, before["cpu_seconds"]
    spent = before["cpu_seconds"] + _cpu_seconds() - start
    file.write_text(json.dumps({"step": state.step, "cpu_seconds": spent}) + "\n")
    return state, spent


def _cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@torch.no_grad()
def evaluate(models, entries):
    """(numbers, views): of each target {"loss", "psnr"} on LOSS_CLIPS clips of each held-out video under fixed masks, and
    for each video (name, {row: uint8 [f, h, w, 3]}) of its middle clip."""
    views = ViewClips(entries, ClipConfig(stride=2), frames=MODEL.num_frames, size=MODEL.image_size, temporal=LOSS_CLIPS)
    sums, shown = {target: {"loss": 0.0, "error": 0.0, "known": 0.0} for target in models}, []
    for number, entry in enumerate(entries):
        video = as_video(views[number]["clips"])
        rows = {}
        for target, model in models.items():
            mask = model.sample_mask(len(video), generator=torch.Generator().manual_seed(number))
            out = model(video, mask=mask)
            pictures = model.reconstruct(video, out)
            sums[target]["loss"] += out.loss.item() / len(entries)
            hidden = (pictures.masked != pictures.original).any(1, keepdim=True)
            error = (pictures.reconstruction - pictures.original).square().mean(1, keepdim=True)
            sums[target]["error"] += (error * hidden).sum().item()
            sums[target]["known"] += hidden.sum().item()
            middle = LOSS_CLIPS // 2
            rows.setdefault("original", to_uint8(pictures.original[middle]))
            rows.setdefault("masked", to_uint8(pictures.masked[middle]))
            rows[target] = to_uint8(pictures.reconstruction[middle])
        shown.append((Path(entry.path).stem, rows))
    numbers = {
        target: {"loss": values["loss"], "psnr": -10 * math.log10(values["error"] / values["known"])}
        for target, values in sums.items()
    }
    return numbers, shown


def table_rows(about):
    """The rows of the page's table, as words."""
    names = {"pixels": "pixels", "normalized_pixels": "normalised patches, with mean and contrast from the original"}
    return [
        [names[target], f"{run['before']:.2f}", f"{run['after']:.2f}", f"{run['psnr']:.1f} dB", f"{run['cpu_minutes']:.0f}"]
        for target, run in about["runs"].items()
    ]


def labels():
    """{row: its label}, from the top."""
    return {
        "original": "original",
        "masked": f"{MODEL.mask_ratio:.0%} masked",
        **{
            target: f"predicted: {'pixels' if target == 'pixels' else 'normalised patches'} ({TARGETS[target]})"
            for target in TARGETS
        },
    }


def picture(shown, columns=4, gap=4, label=20, between=24):
    """One picture: a block for each video, a row for each of ``labels()``, a column for each of ``columns`` frames."""
    texts, font = labels(), ImageFont.load_default(12)
    count, side = shown[0][1]["original"].shape[:2]
    chosen = [round(index * (count - 1) / (columns - 1)) for index in range(columns)]
    block = columns * (side + gap) - gap
    if max(font.getlength(text) for text in texts.values()) > block:
        raise ValueError(f"labels: expected them to be at most {block} pixels wide, so that none is cut")
    sheet = Image.new("RGB", (len(shown) * (block + between) - between + 2 * gap, len(texts) * (side + label + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (_, rows) in enumerate(shown):
        left = gap + number * (block + between)
        for row, (name, text) in enumerate(texts.items()):
            top = row * (side + label + gap)
            draw.text((left, top + 3), text, fill="black", font=font)
            for column, frame in enumerate(chosen):
                sheet.paste(Image.fromarray(rows[name][frame]), (left + column * (side + gap), top + label))
    return sheet


def animate(shown, path, gap=4):
    """An endless GIF, eight frames a second: a row for each video, its originals, masked ones and predictions side by side."""
    count, side = shown[0][1]["original"].shape[:2]
    frames = []
    for number in range(count):
        sheet = Image.new("RGB", (len(labels()) * (side + gap) + gap, len(shown) * (side + gap) + gap), "white")
        for row, (_, pictures) in enumerate(shown):
            for column, name in enumerate(labels()):
                sheet.paste(Image.fromarray(pictures[name][number]), (gap + column * (side + gap), gap + row * (side + gap)))
        frames.append(sheet)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0)


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.reconstruction", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", nargs="+", default=["/usr/share/backgrounds"], help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1300, help="of the first run (default: %(default)s)")
    parser.add_argument("--videos", type=int, default=VIDEOS, help="made of each photograph (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/reconstruction"), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    photographs = load_photographs(arguments.photos)
    videos = make_videos(photographs, arguments.work / "videos", arguments.videos)
    models, runs = {}, {}
    for target in TARGETS:
        settings = config(target, videos, arguments.work, arguments.steps)
        state, spent = train(settings)
        if not state.done:
            return
        models[target] = checkpoint.load(Path(settings.output) / "model.safetensors").eval()
        runs[target] = {"cpu_minutes": spent / 60, "before": state.before["held_out_loss"], "after": state.after["held_out_loss"]}
    numbers, shown = evaluate(models, find_videos(str(ASSETS / "held_out.txt")))
    for target, values in numbers.items():
        runs[target].update(values)
        print(target, runs[target])
    about = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "photographs": len(photographs),
        "made_videos": len(photographs) * arguments.videos,
        "steps": arguments.steps,
        "clips_a_step": BATCH * REPEATS,
        "model": MODEL.to_dict(),
        "runs": runs,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "longer-run.json").write_text(json.dumps(about, indent=1) + "\n")
    picture(shown).save(arguments.output / "longer-run.png", optimize=True)
    animate(shown, arguments.output / "longer-run.gif")


if __name__ == "__main__":
    main()
