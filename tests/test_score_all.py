"""Several folders and metrics in one command: what is compared, kept, written and refused."""

from __future__ import annotations

import csv
import html.parser
import json
import os

import pytest
import torch
from click.testing import CliRunner
from test_scoring import PROMPTS, refused, write_images, write_prompts, write_samples
from tiny_rewards import write_emoji_folder

from training.images import load_image
from training.ppo.comparison import compare, load_scores, to_csv
from training.ppo.reward_models.emoji import RewardEmoji
from training.ppo.scripts import score_all


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Remembered hashes go to a folder of this test run, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Options that put two tiny models in the place of the embedded ones."""
    folder = tmp_path_factory.mktemp("judges")
    for seed, name in enumerate(("emoji_reward", "emoji_heldout")):
        write_emoji_folder(folder / name, seed)
    weights = [f"--weights={name}={folder / name}" for name in ("emoji_reward", "emoji_heldout")]
    return folder, ["--metrics", "emoji_reward,emoji_heldout", *weights]


@pytest.fixture
def folders(tmp_path):
    """Three folders of the same seeds and prompts, with different pictures."""
    names = ["learned", "ddim", "heun"]
    for number, name in enumerate(names):
        write_samples(tmp_path / name, [0, 1, 2, 3, 4], **{f"extra{i}": 0 for i in range(number)})
    return [tmp_path / name for name in names]


def run(folders, judges, output, *options):
    arguments = ["--images", *folders, *judges[1], "--output-json", output, "--device", "cpu", *options]
    return CliRunner().invoke(score_all.main, [str(argument) for argument in arguments])


def test_every_number_is_that_of_the_single_scores(folders, judges, tmp_path):
    output = tmp_path / "out" / "comparison.json"
    result = run(folders, judges, output)
    assert result.exit_code == 0, result.output
    comparison = json.loads(output.read_text())
    assert comparison["reference"] == "learned"
    assert (output.with_suffix(".md")).read_text() == result.stdout
    reward = RewardEmoji("emoji_heldout", judges[0] / "emoji_heldout")
    images = {folder.name: [load_image(folder / f"000000/{seed:06d}.png") for seed in range(5)] for folder in folders}
    scores = {name: reward.score(torch.stack(some), PROMPTS[:5]).double() for name, some in images.items()}
    for row in comparison["rows"]:
        assert row["scores"]["emoji_heldout"]["mean"] == pytest.approx(scores[row["label"]].mean().item(), abs=1e-6)
        kept = load_scores(output.parent / f"{row['label']}-emoji_heldout.json")
        assert [one["score"] for one in kept["scores"]] == pytest.approx(scores[row["label"]].tolist(), abs=1e-6)
        if row["label"] != "learned":
            gaps = scores["learned"] - scores[row["label"]]
            found = row["differences"]["emoji_heldout"]
            assert found["mean"] == pytest.approx(gaps.mean().item(), abs=1e-6)
            assert found["wins"] == pytest.approx((gaps > 0).double().mean().item())
    lines = list(csv.DictReader(output.with_suffix(".csv").read_text().splitlines()))
    assert [(line["label"], line["metric"]) for line in lines] == [
        (folder.name, metric) for folder in folders for metric in ("emoji_reward", "emoji_heldout")
    ]
    assert float(lines[3]["difference"]) == comparison["rows"][1]["differences"]["emoji_heldout"]["mean"]
    assert lines[0]["difference"] == ""


class Page(html.parser.HTMLParser):
    """Counts elements and collects what is shown."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.images, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_the_extremes_and_nothing_from_elsewhere(folders, judges, tmp_path):
    output = tmp_path / "comparison.json"
    for folder in folders:
        manifest = folder / "manifest.jsonl"
        manifest.write_text(manifest.read_text().replace(PROMPTS[3], "<script>alert(1)</script> & co"))
    assert run(folders, judges, output).exit_code == 0
    text = output.with_suffix(".html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags
    assert all(image["src"].startswith("data:image/") for image in page.images)
    assert "http" not in text
    records = {
        (folder.name, metric): load_scores(tmp_path / f"{folder.name}-{metric}.json")
        for folder in folders
        for metric in ("emoji_reward", "emoji_heldout")
    }
    shown = 0
    for (name, metric), record in records.items():
        if name == "learned":
            continue
        ours = [row["score"] for row in records["learned", metric]["scores"]]
        gaps = [a - row["score"] for a, row in zip(ours, record["scores"], strict=True)]
        assert f"{max(gaps):+.4f}" in page.text
        assert (f"{min(gaps):+.4f}" in page.text) == (min(gaps) < 0)  # what it wins least is not shown
        shown += min(sum(gap > 0 for gap in gaps), 4) + min(sum(gap < 0 for gap in gaps), 4)
    assert len(page.images) == 2 * shown
    assert "<script>alert(1)</script> & co" in page.text


def test_what_is_scored_is_kept_until_something_changes(folders, judges, tmp_path):
    output = tmp_path / "out" / "comparison.json"
    assert run(folders, judges, output).exit_code == 0
    kept = {path.name: path.stat().st_mtime_ns for path in output.parent.glob("*-emoji_*.json")}
    assert len(kept) == 6
    assert run(folders, judges, output).stderr.count("scored before") == 6
    assert {path.name: path.stat().st_mtime_ns for path in output.parent.glob("*-emoji_*.json")} == kept
    # A picture is made anew after its folder was scored, and one file of scores is lost.
    for name, written in kept.items():
        os.utime(output.parent / name, ns=(written - 10**10, written - 10**10))
    for folder in folders:
        for picture in folder.rglob("*.png"):
            os.utime(picture, ns=(min(kept.values()) - 2 * 10**10,) * 2)
    write_images(folders[1], ["000000/000002.png"], seed=99)
    (output.parent / "heun-emoji_reward.json").unlink()
    second = run(folders, judges, output)
    assert second.exit_code == 0, second.output
    assert second.stderr.count("scored before") == 3
    fresh = tmp_path / "fresh" / "comparison.json"
    assert run(folders, judges, fresh).exit_code == 0
    assert json.loads(fresh.read_text())["rows"] == json.loads(output.read_text())["rows"]
    # Another model under the same name.
    other = tmp_path / "other"
    write_emoji_folder(other, seed=7)
    third = run(folders, judges, output, f"--weights=emoji_reward={other}")
    assert third.stderr.count("scored before") == 3


def test_unequal_folders_are_listed_before_any_model_loads(folders, judges, tmp_path):
    bad = ["--metrics", "emoji_reward", "--weights", f"emoji_reward={tmp_path / 'nowhere'}"]
    write_samples(folders[1], [0, 1, 2, 3])
    write_samples(folders[2], [0, 2, 3, 4, 5])
    (folders[1] / "000000/000004.png").unlink()
    (folders[2] / "000000/000001.png").unlink()
    result = run(folders, (None, bad), tmp_path / "a.json")
    refused(result, "learned lacks 1 images, of seeds 5")
    for part in (
        "ddim lacks 2 images, of seeds 4, 5",
        "heun lacks 1 images, of seeds 1",
        "--allow-missing compares the 3 that all have",
    ):
        assert part in result.stderr
    manifest = folders[0] / "manifest.jsonl"
    manifest.write_text(manifest.read_text() + manifest.read_text().splitlines()[0] + "\n")
    refused(run(folders, (None, bad), tmp_path / "a.json"), "more than once")
    assert not (tmp_path / "a.json").exists()


def test_allow_missing_compares_the_intersection(folders, judges, tmp_path):
    (folders[1] / "000000/000003.png").unlink()
    (folders[2] / "000000/000001.png").write_bytes((folders[2] / "000000/000001.png").read_bytes()[:200])
    refused(run(folders, judges, tmp_path / "a.json"), "1 of the 5 images in")
    result = run(folders, judges, tmp_path / "a.json", "--allow-missing")
    assert result.exit_code == 0, result.output
    assert "seeds 3" in result.stderr and "000001.png" in result.stderr
    comparison = json.loads((tmp_path / "a.json").read_text())
    assert comparison["count"] == 3
    whole = run(folders[:1], judges, tmp_path / "whole" / "a.json")
    assert whole.exit_code == 0
    scores = {row["seed"]: row["score"] for row in load_scores(tmp_path / "whole/learned-emoji_reward.json")["scores"]}
    mean = sum(scores[seed] for seed in (0, 2, 4)) / 3
    assert comparison["rows"][0]["scores"]["emoji_reward"]["mean"] == pytest.approx(mean, abs=1e-7)


def test_an_unreadable_image_is_an_error_and_the_rest_is_kept(folders, judges, tmp_path):
    (folders[2] / "000000/000001.png").write_bytes(b"\x89PNG nothing")
    result = run(folders, judges, tmp_path / "out" / "a.json")
    refused(result, "1 images of")
    assert "000001.png" in result.stderr
    assert len(list((tmp_path / "out").glob("learned-*.json"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "emoji_reward,clap"], "unknown reward 'clap'"),
        (["--metrics", "emoji_reward,clap", "--fetch-only"], "unknown reward 'clap'"),
        (["--metrics", " , "], "--metrics names none"),
        (["--metrics", "emoji_reward", "--weights", "hps=x"], "--weights hps=x: expected METRIC=PATH"),
        (["--metrics", "emoji_reward", "--weights", "emoji_reward"], "expected METRIC=PATH"),
        (["--metrics", "emoji_reward", "--images", "{first}"], "names a folder twice"),
        (["--metrics", "emoji_reward", "--output-json", "x.txt"], "must end in .json"),
        (["--metrics", "emoji_reward", "--output-json", "{mine}"], "exists and is no comparison"),
    ],
)
def test_mistakes_are_one_line(folders, tmp_path, options, message):
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    options = [option.format(first=folders[0], mine=mine) for option in options]
    arguments = ["--images", *folders, "--output-json", tmp_path / "a.json", "--device", "cpu", *options]
    refused(CliRunner().invoke(score_all.main, [str(argument) for argument in arguments]), message)
    assert mine.read_text() == "{}"


def test_a_file_of_something_else_is_not_replaced(folders, judges, tmp_path):
    mine = tmp_path / "out" / "heun-emoji_heldout.json"
    mine.parent.mkdir()
    mine.write_text('{"metric": "mine"}')
    refused(run(folders, judges, tmp_path / "out" / "a.json"), "exists and holds no other scores of")
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]


def test_weights_are_looked_for_without_images():
    result = CliRunner().invoke(score_all.main, ["--metrics", "emoji_reward,emoji_heldout", "--fetch-only"])
    assert result.exit_code == 0
    assert [line.split(": ")[0] for line in result.stdout.splitlines()] == ["emoji_reward", "emoji_heldout"]
    missing = CliRunner().invoke(score_all.main, ["--metrics", "emoji_reward,pick", "--fetch-only"])
    refused(missing, "PickScore_v1")
    refused(CliRunner().invoke(score_all.main, ["--metrics", "emoji_reward"]), "or --fetch-only")


def test_foreign_folders_pair_by_position(judges, tmp_path):
    for number, name in enumerate(("a", "b")):
        write_images(tmp_path / name, ["1.png", "2.png"], seed=number)
    prompts = write_prompts(tmp_path / "prompts.txt", PROMPTS[:2])
    result = run([tmp_path / "a", tmp_path / "b"], judges, tmp_path / "out" / "a.json", "--prompts", prompts)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "a.json").read_text())["count"] == 2


def test_a_csv_without_reference_has_no_differences(folders, judges, tmp_path):
    assert run(folders, judges, tmp_path / "out" / "a.json").exit_code == 0
    records = [load_scores(path) for path in sorted((tmp_path / "out").glob("*-emoji_*.json"))]
    (line, *_) = csv.DictReader(to_csv(compare(records)).splitlines())
    assert (line["reference"], line["difference"], line["count"]) == ("", "", "5")
