"""The study of the paper's ablations: its arithmetic by hand, tiny runs, its page against what was recorded."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from stmae.training.planning.flops import autoencoder_flops
from studies import ablations, mask_ratio
from studies.ablations import ABLATIONS, FINDINGS, SETTINGS, Results
from studies.mask_ratio import Plan, Study
from studies.motion import clips
from studies.motion.schedule import load

from .test_motion import folder  # noqa: F401  a fixture

DOCS = Path(__file__).parents[2] / "docs"
TINY = Plan(unlabelled=24, train=32, test=40, width=32, depth=1, num_heads=2, decoder_width=16, batch=8, warmup=2)


def model_of(setting, plan=TINY):
    changes, _ = SETTINGS[setting]
    return ablations.autoencoder(plan, 0, **changes)


def test_each_setting_changes_one_thing():
    """Besides the grid, which larger frames change, and the ratio, for masks that are compared at 75 %."""
    base, same = model_of("base", Plan()).config, {"base", "random-75", "large-pixels", "repeats-2", "repeats-4"}
    for setting in SETTINGS:
        config = model_of(setting, Plan()).config
        changed = {key for key, value in config.to_dict().items() if value != base.to_dict()[key]}
        allowed = {"image_size", "patch_size"} if setting.startswith("large") else {"mask_ratio"} if "75" in setting else set()
        assert len(changed - allowed) == (setting not in same), (setting, changed)
        assert config.num_tokens == 256


def test_every_setting_is_shown_and_every_finding_has_its_settings():
    shown = {row.setting for rows in ABLATIONS.values() for row in rows} - {None}
    assert shown == set(SETTINGS)
    assert {name for better, worse, _ in FINDINGS.values() for name in (better, worse)} <= set(SETTINGS)


def test_findings_are_the_paper_s_numbers():
    """A finding's difference is that of its rows' numbers."""
    for finding, (better, worse, difference) in FINDINGS.items():
        papers = []
        for rows in ABLATIONS.values():
            found = {row.setting: row.paper for row in rows}
            if better in found and worse in found:
                papers.append((found[better], found[worse]))
        known = [a - b for a, b in papers if a is not None and b is not None]
        assert (difference is None) == (not known), finding
        assert not known or known[0] == pytest.approx(difference), finding


def test_decoders_have_the_paper_s_fractions_of_the_encoder():
    for row in ABLATIONS["decoder width"]:
        config = model_of(row.setting, Plan()).config
        assert config.decoder_width == int(row.label) and config.decoder_width / config.width == int(row.paper_label) / 1024
    for row in ABLATIONS["decoder depth"]:
        assert model_of(row.setting).config.decoder_depth == int(row.label)


def test_repeats_load_fewer_clips_and_mask_each_anew(folder, monkeypatch):  # noqa: F811
    steps = []

    class Recorded(mask_ratio.AveragedTraining):
        def step(self, video, generator):
            steps.append(video.clone())
            super().step(video, generator)

    monkeypatch.setattr(mask_ratio, "AveragedTraining", Recorded)
    study = Study(str(folder), TINY, "")
    for repeats in (1, 4):
        steps.clear()
        mask_ratio.train_and_probe(study, model_of("base"), 0, [2], "", repeats)
        loaded = Counter(clip.numpy().tobytes() for video in steps for clip in video)
        assert len(loaded) == 2 * TINY.batch // repeats and set(loaded.values()) == {repeats}
    keep, _ = model_of("base").sample_mask(4, generator=torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in keep.tolist()}) == 4


@pytest.mark.parametrize("setting", ["multi-block", "large-hog"])
def test_a_run_is_repeatable_and_probed_where_it_should(folder, setting):  # noqa: F811
    changes, repeats = SETTINGS[setting]
    study = Study(str(folder), TINY, "", "studies.ablations")
    runs = [ablations.ablation(study, {}, changes, repeats, [1, 2], 0) for _ in range(2)]
    assert runs[0] == runs[1]
    assert tuple(runs[0]["accuracy"]) == (1, 2) and all(0 <= value <= 1 for value in runs[0]["accuracy"].values())
    assert runs[0]["tokens"] == 256 and runs[0]["gflops_a_clip"] > 0


def test_counts_of_multi_block_masks_are_means():
    visible, masked = ablations.mean_counts(model_of("multi-block"))
    assert visible + masked == 256 and 40 < visible < 128
    visible, masked = ablations.mean_counts(model_of("frame-75"))
    assert (visible, masked) == (64, 192)


def test_verdicts():
    assert ablations.verdict([], 0.01) == "not run" and ablations.verdict([0.5], 0.01) == "one seed"
    assert ablations.verdict([0.03, 0.05], 0.03) == "yes" and ablations.verdict([-0.03, -0.05], 0.03) == "**no**"
    assert ablations.verdict([0.01, 0.04], 0.03) == "undecided"  # no more than the seeds' spread
    assert ablations.verdict([-0.01, 0.2], 0.03) == "undecided"  # they disagree


def test_results_by_hand():
    def of(accuracy):
        return {"accuracy": {"150": 0.1, "300": accuracy / 2, "600": accuracy}, "visible": 25, "gflops_a_clip": 2 * accuracy}

    found = {"base-seed0": of(0.5), "base-seed1": of(0.6), "repeats-4-seed0": of(0.8)}
    found["loading"] = {"videos": 8, "milliseconds": {"1": 12.0, "2": 8.0, "4": 4.0}}
    results = Results(found, [0, 1, 2])
    assert results.spread() == pytest.approx(0.1) and results.one("repeats-2", "visible") is None
    lines = ablations.ablation_table(results, "repeated sampling").splitlines()
    assert lines[2] == "| 1 | 83.7 | 25 | 1.00x | 27.5 (25.0-30.0) | 55.0 (50.0-60.0) |"
    assert lines[3] == "| 2 | 84.3 | - | - | not run | not run |" and lines[4] == "| 4 | 84.4 | 25 | 1.60x | 40.0 | 80.0 |"
    lines = ablations.loading_table(results).splitlines()
    assert lines[2] == "| 1 | 1.0x | 12.0 ms | 1.0x | 55.0 (50.0-60.0) | 10.0 (10.0-10.0) |"
    assert lines[4] == "| 4 | 3.0x | 4.0 ms | 3.0x | 80.0 | 80.0 |" and "9,600 clips loaded" in lines[0]
    assert "| repeated sampling: 4 above 1 | +0.7 | +30.0 (+30.0) | one seed |" in ablations.findings_table(results)


def test_the_loader_s_time_is_measured_for_every_number_of_repeats():
    found = ablations.loading(None, {}, rounds=1)
    assert set(found["milliseconds"]) == set(ablations.REPEATS) and min(found["milliseconds"].values()) > 0
    assert found["videos"] == 8


def test_finished_experiments_are_found_again(tmp_path):
    experiments = ablations.all_experiments([0, 1])
    assert len(experiments) == len({item.name for item in experiments}) == 1 + 2 * len(SETTINGS)
    study = Study("", TINY, str(tmp_path), "studies.ablations")
    for experiment in experiments:
        record = {"plan": TINY.to_dict(), "arguments": experiment.arguments}
        (tmp_path / f"{experiment.name}.json").write_text(json.dumps(record))
        assert load(tmp_path, study, experiment)


def test_the_page_gives_what_was_recorded(tmp_path):
    recorded, page = json.loads((DOCS / "ablations.json").read_text()), (DOCS / "ablations.md").read_text()
    results = Results(recorded["experiments"], recorded["seeds"])
    assert all(table in page for table in ablations.texts(results)) and "](ablations.png)" in page
    assert recorded["processor"] in page and recorded["date"] in page
    run = f"{recorded['finished_experiments']} of {recorded['experiments_in_all']} experiments"
    assert f"{run}, {recorded['cpu_minutes']:.0f} minutes" in page and f"{100 * results.spread():.1f} points" in page
    ablations.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert recorded["plan"] == Plan().to_dict() and len(clips.CLASSES) == 8
    for setting in SETTINGS:  # what a setting costs is today's count
        if results.of(setting):
            model = model_of(setting, Plan())
            visible, masked = ablations.mean_counts(model)
            assert results.one(setting, "visible") == visible
            assert results.one(setting, "gflops_a_clip") == autoencoder_flops(model.config, visible, masked)[1] / 1e9
