"""A run's report: its numbers are those of the logs, it stands alone in a real browser, and a run may lack anything."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from run_folders import lines, only_run
from test_scoring import refused
from toy_training import run_toy, write_files

from training.ppo import report
from training.ppo.report_charts import Axes, Curve, line_chart, number, table_picture, thinned, ticks
from training.ppo.report_run import read_run
from training.ppo.run_dir import RunDirectory
from training.table import load_table

REPOSITORY = Path(__file__).resolve().parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no chromium or google-chrome here")
SECTIONS = ["curves", "table", "samples", "baselines", "use", "configuration"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished toy run of 6 steps with 4 evaluations; tests that change a run take a copy."""
    root = tmp_path_factory.mktemp("report")
    run_toy(write_files(root), "never", ["ppo.steps=6", "ppo.train_scale_dir=true"])
    return only_run(root).path


@pytest.fixture
def run_dir(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / finished.name))


def write(run_dir, *options):
    return CliRunner().invoke(report.main, [str(run_dir), *map(str, options)])


class Page(html.parser.HTMLParser):
    """What a page holds: ids, tags, attributes that name resources, the cells of tables, and all text."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.tags, self.resources, self.rows, self.text = [], set(), [], [], ""
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.resources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


# --- What it says ---------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_run(run_dir):
    result = write(run_dir)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{run_dir / 'report.html'}\n"
    text = (run_dir / "report.html").read_text()
    page = Page(text)
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert "Finished: all 6 steps are done." in page.text
    directory = RunDirectory(run_dir)
    metrics, evaluations = lines(directory.metrics), lines(directory.evaluations)
    rows = {tuple(row) for row in page.rows}
    assert len(evaluations) == 4 and len(metrics) == 6
    for record in evaluations:
        cells = []
        for name in ("reward", "toy_spread"):
            half = (record[f"{name}_ci95_high"] - record[f"{name}_ci95_low"]) / 2
            assert half > 0
            cells.append(f"{record[f'{name}_mean']:.4f} ± {half:.4f}")
        assert (str(record["step"]), "6", *cells, "") in rows
    for record in metrics:
        half = (record["reward_ci95_high"] - record["reward_ci95_low"]) / 2
        keys = ("kl", "clip_fraction", "entropy", "learning_rate", "images_per_second")
        cells = (number(record[key]) for key in keys)
        assert (str(record["step"]), f"{record['reward_mean']:.4f} ± {half:.4f}", *cells) in rows
    for title in ("Reward", "Held-out metric: toy_spread", "KL to the start policy", "Clip fraction", "Entropy of"):
        assert f"<h3>{title}" in text
    assert "Images per second" in text and "logs/metrics.jsonl" in text and "logs/evaluation.jsonl" in text
    assert ("ppo.steps", "6", "100") in rows  # what differs from the defaults
    assert ("ppo.clip_range", "0.2") in rows


def test_the_table_after_is_the_one_that_an_export_gives(run_dir):
    from training.ppo.export_epd_predictor import export_predictor

    assert write(run_dir).exit_code == 0
    page = Page((run_dir / "report.html").read_text())
    exported = load_table(export_predictor(run_dir).with_suffix(".safetensors"))
    start = load_table(RunDirectory(run_dir).start_table)
    assert exported.sha256() in page.text
    rows = [row for row in page.rows if len(row) == 8]
    assert len(rows) == 1 + 6
    for row in rows[1:]:
        place = int(row[0]), int(row[1])
        names = ("positions", "weights", "scale_dir")  # scale_time is 1
        assert row[2:] == [f"{getattr(table, name)[place]:.6f}" for name in names for table in (start, exported)]
    for position in exported.positions.flatten().tolist():
        assert f">{position:.3f}</text>" in (run_dir / "report.html").read_text()


def test_scores_become_a_comparison(run_dir, tmp_path):
    shared = {"metric": "toy", "version": "1", "weights_sha256": "0", "preprocessing": "none", "dtype": "float32"}
    files = []
    for name, gain in (("learned", 0.25), ("ddim", 0.0)):
        scores = [{"seed": s, "prompt": "a", "file": f"{s}.png", "score": s / 10 + gain} for s in range(4)]
        record = {**shared, "images_dir": f"samples/{name}", "libraries": {}, "unreadable": [], "scores": scores}
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(record))
    result = write(run_dir, "--scores", files[0], "--scores", files[1])
    assert result.exit_code == 0, result.output
    page = Page((run_dir / "report.html").read_text())
    assert ["ddim", "+0.2500 ± 0.0000 (100%)"] in page.rows
    assert str(files[1]) in page.text and "4 images in each folder" in page.text


# --- Runs as they are -----------------------------------------------------------------------------------------------


def test_an_unfinished_run_without_checkpoint_says_so(run_dir):
    directory = RunDirectory(run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    kept = directory.metrics.read_text().splitlines(keepends=True)[:2]
    directory.metrics.write_text("".join(kept) + '{"step": 3, "rew')
    result = write(run_dir)
    assert result.exit_code == 0, result.output
    page = Page((run_dir / "report.html").read_text())
    assert "Unfinished: 2 of 6 steps are done." in page.text
    assert "1 lines of logs/metrics.jsonl could not be read" in page.text
    assert "There is no learned table yet" in page.text


def test_what_is_missing_is_left_out(run_dir):
    for name in ("logs", "samples", "checkpoints"):
        shutil.rmtree(run_dir / name)
    result = write(run_dir)
    assert result.exit_code == 0, result.output
    page = Page((run_dir / "report.html").read_text())
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert "Nothing has been logged yet." in page.text and "no sample pictures" in page.text


def test_damaged_checkpoint_and_picture_are_named(run_dir):
    best = RunDirectory(run_dir).best_checkpoint
    best.write_bytes(best.read_bytes()[:-10])
    (run_dir / "samples" / "step000002.png").write_bytes(b"\x89PNG nothing")
    assert write(run_dir).exit_code == 0
    page = Page((run_dir / "report.html").read_text())
    assert "policy-best.pt" in page.text and "damaged" in page.text
    assert "step000002.png" in page.text and len(page.resources) == 3


def test_lines_that_cannot_be_drawn_are_counted(run_dir):
    log = RunDirectory(run_dir).metrics
    whole = log.read_text()
    bad = ["[]", '{"step": "1"}', '{"step": -1}', '{"step": 9, "kl": "high"}', '{"step": 9, "kl": NaN}', "{" * 2000]
    bad.append('{"step": 9, "kl": 1e300}')
    log.write_text("\n".join(bad) + "\n" + whole)
    found = read_run(run_dir).metrics
    assert found.unread == len(bad)
    assert [record["step"] for record in found.records] == [1, 2, 3, 4, 5, 6]


def test_hostile_names_stay_text(run_dir):
    config = RunDirectory(run_dir).config
    name = "<img src=x onerror=alert(1)>&amp;\"'<script>alert(2)<"
    config.write_text(config.read_text().replace("run_name: toy", f"run_name: {json.dumps(name)}"))
    evaluations = RunDirectory(run_dir).evaluations
    evaluations.write_text(evaluations.read_text().replace("toy_spread", "<b>spread</b>"))
    result = write(run_dir)
    assert result.exit_code == 0, result.output
    page = Page((run_dir / "report.html").read_text())
    assert not page.tags & {"script", "b2", "iframe", "link", "object"}
    assert name in page.text and "<b>spread</b>" in page.text
    assert all(resource.startswith("data:image/") for resource in page.resources)


def test_only_a_report_is_replaced(run_dir, tmp_path):
    assert write(run_dir).exit_code == 0
    first = (run_dir / "report.html").read_bytes()
    assert write(run_dir).exit_code == 0  # the same again
    assert (run_dir / "report.html").read_bytes() == first
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html>\n<p>mine</p>")
    refused(write(run_dir, "--output", mine), "exists and is no report of a run")
    assert mine.read_text() == "<!doctype html>\n<p>mine</p>"
    refused(write(run_dir, "--output", tmp_path / "report.txt"), "must end in .html")
    refused(write(tmp_path / "nowhere"), "is not a run folder")
    refused(write(run_dir, "--scores", tmp_path / "none.json"), "does not exist")


def test_help_does_not_wait_for_torch():
    program = (
        "import sys; from training.ppo.report import main;"
        "main(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert time.perf_counter() - started < 2


# --- Drawings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.882, 0.889, [0.882, 0.884, 0.886, 0.888]),
        (-3.0, 330.0, [0, 100, 200, 300]),
    ],
)
def test_ticks_are_round_and_inside(low, high, wanted):
    assert ticks(low, high, 5) == pytest.approx(wanted)


@pytest.mark.parametrize("exponent", [-30, -9, 0, 9, 30])
def test_curves_of_any_size_and_length_stay_inside(exponent):
    scale = 10.0**exponent
    for count in (1, 2, 5000):
        values = [scale * (1 + index % 7) for index in range(count)]
        curve = Curve("x", range(count), values, [0.5 * v for v in values], [None] * count, dots=True)
        places = re.findall(r"([\d.-]+),([\d.-]+)", re.search('points="([^"]*)"', line_chart("t", [curve]))[1])
        assert 1 <= len(places) <= 300
        assert all(0 <= float(x) <= 360 and 0 <= float(y) <= 210 for x, y in places)


def test_a_chart_is_to_scale():
    axes = Axes([Curve("x", [0, 10], [0.0, 1.0], [0.0, 0.5], [0.0, 2.0])])
    assert axes.x(5) == pytest.approx((axes.x(0) + axes.x(10)) / 2)
    assert axes.y(2.0) < axes.y(1.0) < axes.y(0.0)
    assert axes.low < 0 and axes.high > 2


def test_thinning_keeps_both_ends():
    assert thinned(3, 5) == [0, 1, 2]
    assert thinned(1000, 5)[0] == 0 and thinned(1000, 5)[-1] == 999 and len(set(thinned(1000, 5))) == 5


def test_discs_lie_at_their_positions():
    drawn = table_picture([[0.25, 0.75]], [[0.5, 0.5]], [[0.1, 0.6]], [[0.2, 0.8]], [4.0, 1.0])
    new = [float(x) for x in re.findall('class="new" cx="([^"]*)"', drawn)]
    old = [float(x) for x in re.findall('class="old" cx="([^"]*)"', drawn)]
    assert (new[1] - new[0]) / (old[1] - old[0]) == pytest.approx(1.0, abs=1e-3)
    assert (old[0] - new[0]) / (old[1] - old[0]) == pytest.approx(0.3, abs=1e-3)
    radii = [float(r) for r in re.findall('class="new"[^>]* r="([^"]*)"', drawn)]
    assert (radii[1] / radii[0]) ** 2 == pytest.approx(4, rel=0.05)
    assert "σ 4" in drawn and ">0.600</text>" in drawn and ">w 0.800</text>" in drawn


# --- In a real browser ----------------------------------------------------------------------------------------------

PROBE = """<script>
const faults = [];
addEventListener("error", event => faults.push(String(event.message)), true);
addEventListener("securitypolicyviolation", event => faults.push(event.violatedDirective));
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const seen = {
    faults, width: innerWidth, scroll: document.documentElement.scrollWidth,
    images: [...document.images].map(one => one.complete ? one.naturalWidth : 0),
    resources: performance.getEntriesByType("resource").map(one => one.name),
    headings: [...document.querySelectorAll("h2")].map(one => [one.id, one.getBoundingClientRect().height > 0]),
    charts: [...document.querySelectorAll("svg")].map(one => one.getBoundingClientRect().width),
    paper: getComputedStyle(document.body).backgroundColor,
  };
  const result = document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify(seen);
  parent.document.body.append(result);
});
</script>"""


def browse(page, width, folder, *options):
    """What PROBE, put into `page`, finds in a frame of `width` pixels, and what the browser said.

    A frame, for the browser has no window that is as narrow as a phone.
    """
    text = page.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    text = html.escape(text.replace("<title>", f"{PROBE}<title>", 1))
    outer = folder / "outer.html"
    outer.write_text(f'<body><iframe width="{width}" height="900" frameborder="0" srcdoc="{text}"></iframe></body>')
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--window-size=1300,1000"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", outer.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="probe">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stderr[-2000:]
    return json.loads(html.unescape(found[1])), result.stderr


@needs_browser
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_in_a_browser(run_dir, tmp_path, width):
    assert write(run_dir).exit_code == 0
    page = run_dir / "report.html"
    assert "http" not in page.read_text().replace("http-equiv", "")
    seen, said = browse(page, width, tmp_path)
    assert seen["width"] == width
    assert seen["scroll"] <= width, "the page is wider than the window"
    assert seen["faults"] == [] and "CONSOLE" not in said
    assert seen["resources"] == []
    assert len(seen["images"]) == 4 and min(seen["images"]) > 0
    assert seen["headings"] == [[name, True] for name in SECTIONS]
    assert len(seen["charts"]) == 7 and min(seen["charts"]) > 100


@needs_browser
def test_the_browser_finds_planted_faults(run_dir, tmp_path):
    assert write(run_dir).exit_code == 0
    page = run_dir / "report.html"
    planted = '<img src="http://example.org/a.png"><div style="width:2000px">wide</div><script>nothing()</script>'
    page.write_text(page.read_text().replace("</main>", f"{planted}</main>"))
    seen, said = browse(page, 1200, tmp_path)
    assert seen["scroll"] >= 2000 and 0 in seen["images"]
    assert "img-src" in seen["faults"] and any("nothing" in fault for fault in seen["faults"])
    assert "CONSOLE" in said


@needs_browser
def test_a_hostile_run_does_nothing_in_a_browser(run_dir, tmp_path):
    config = RunDirectory(run_dir).config
    name = "<img src=x onerror=alert(1)><script>document.title='taken'<"
    config.write_text(config.read_text().replace("run_name: toy", f"run_name: {json.dumps(name)}"))
    assert write(run_dir).exit_code == 0
    seen, _ = browse(run_dir / "report.html", 1200, tmp_path)
    assert seen["faults"] == [] and len(seen["images"]) == 4


@needs_browser
def test_dark_colours(run_dir, tmp_path):
    assert write(run_dir).exit_code == 0
    dark, _ = browse(run_dir / "report.html", 1200, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert dark["paper"] == "rgb(20, 23, 27)"
