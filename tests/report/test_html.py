import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from adamae_fast.report.curves import adaptivity_bars, compact_number, line_chart, share_map
from adamae_fast.report.html import VideoFigure, write_page
from adamae_fast.run_folder import RunFolder

HOSTILE = "videos/<script>alert('x')</script>\"><img src=https://example.com/x.png onerror=alert(1)>&.mp4"
ADAPTIVITY = {
    "adaptive": {"value": 1.84, "standard_error": 0.06},
    "untrained": {"value": 1.17, "standard_error": 0.03},
    "random": {"value": 1.01, "standard_error": 0.02},
    "box_share": 0.147,
    "num_clips": 12,
    "repeats": 8,
}


def picture(kind, size):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 150)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path):
    """A run's folder as pre-training leaves it, stopped in the middle of a line, with hostile names in its files."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    lines = [
        {
            "step": step,
            "loss": 2.0 / step,
            "loss_reconstruction": 2.0 / step,
            "loss_sampling": 7.0 - step / 100,
            "lr": 1e-4,
            "grad_norm": None if step == 20 else 0.5,
            "clips_per_second": 39.0 if step % 2 else 41.0,
            "data_wait_share": 0.25,
            "decode_seconds": 0.03,
            "batches_ready": 2.5,
            "memory_bytes": 3 * 2**30,
            "quarantined": 1,
            "probability_entropy": 6.5,
            "probability_max": 0.01,
        }
        for step in range(1, 102)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 102, "lo')
    run.quarantine.write_text(json.dumps({"reason": "no video stream", "path": HOSTILE}) + "\n")
    run.config.write_text(f"data:\n  manifest: {json.dumps(HOSTILE)}\n")
    return run


@pytest.fixture
def page(run):
    figures = [VideoFigure(HOSTILE, "frames 0 to 30", picture("PNG", (1200, 700)), picture("GIF", (700, 180)))]
    return write_page(
        run.report,
        title=HOSTILE,
        run=run,
        figures=figures,
        adaptivity=ADAPTIVITY,
        facts=[("Device", "cpu")],
        unreadable=[(HOSTILE, "no such file")],
    )


class Elements(HTMLParser):
    """Collects every element with its attributes, and the text."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_page_is_one_file_without_scripts_or_requests(page):
    content = page.read_text(encoding="utf-8")
    parsed = Elements(content)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "iframe", "object", "embed", "base"}
    references = [
        value
        for _, attributes in parsed.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset")
    ]
    assert len(references) == 3  # strip, animation, and an icon, which stops the browser from asking for one
    assert all(reference.startswith("data:") for reference in references)
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    style = re.search(r"<style>(.*?)</style>", content, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_names_are_text_everywhere(page):
    parsed = Elements(page.read_text(encoding="utf-8"))
    # Title, heading, figure, unreadable video, quarantined video; the configuration has its quotes in JSON's way.
    assert parsed.text.count(HOSTILE) == 5
    assert json.dumps(HOSTILE) in parsed.text
    assert all(HOSTILE in attributes["alt"] for tag, attributes in parsed.elements if tag == "img")


def test_headlines_come_from_the_runs_files(page):
    text = re.sub(r"\s+", " ", Elements(page.read_text(encoding="utf-8")).text)
    for expected in (
        "Loss −99 % 2 → 0.0202, mean of the last 5 lines",
        "Adaptivity 1.84× untrained 1.17×, random masks 1.01×",
        "Speed 40 clips/s",
        "Waiting for data 25 % of the time, on average; decoding 30 ms a clip, 2.5 batches ready",
        "Peak memory 3.0 GiB",
        "Quarantined 1",
        "12 clips with known boxes and 8 masks each",
    ):
        assert expected in text


def test_page_of_a_bare_model_has_no_empty_sections(tmp_path):
    page = write_page(tmp_path / "new" / "report.html", title="weights alone", run=RunFolder(tmp_path))
    parsed = Elements(page.read_text(encoding="utf-8"))
    assert not [tag for tag, _ in parsed.elements if tag in ("h2", "section", "svg", "figure", "details")]
    assert list(page.parent.iterdir()) == [page]


def test_name_that_is_not_unicode_does_not_stop_the_report(tmp_path):
    page = write_page(
        tmp_path / "report.html", title="x", unreadable=[(b"caf\xe9.mp4".decode(errors="surrogateescape"), "")]
    )
    assert "caf?.mp4" in page.read_text(encoding="utf-8")


def svg_points(svg, css_class):
    root = ElementTree.fromstring(str(svg))
    element = next(e for e in root.iter() if e.get("class") == css_class)
    return np.array([[float(number) for number in point.split(",")] for point in element.get("points").split()])


def test_line_chart_places_values_in_proportion_and_inside():
    steps, values = [10, 20, 40], [4.0, 1.0, 2.0]
    points = svg_points(line_chart(steps, values, label="loss"), "line a")
    assert len(points) == 3
    widths, heights = np.diff(points[:, 0]), np.diff(points[:, 1])
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.01)
    assert heights[0] / heights[1] == pytest.approx(-3, rel=0.01)  # SVG's y runs down
    assert (points > 0).all()
    assert (points < [460, 210]).all()


def test_line_chart_averages_long_runs_and_keeps_their_mean():
    values = np.random.default_rng(0).normal(5, 1, 100_000)
    svg = line_chart(range(100_000), values, label="loss")
    thin, thick = svg_points(svg, "line faint a"), svg_points(svg, "line a")
    assert len(thin) == len(thick) == 400
    assert thick[:, 1].std() < thin[:, 1].std()
    assert thick[:, 1].mean() == pytest.approx(thin[:, 1].mean(), abs=1)
    assert len(svg) < 30_000


def test_line_chart_of_a_constant_is_level():
    points = svg_points(line_chart([1, 2], [0.5, 0.5], label="x"), "line a")
    assert len(points) == 2
    assert points[0, 1] == points[1, 1]


def test_metrics_without_finite_values_are_left_out_and_others_drawn(tmp_path):
    run = RunFolder(tmp_path)
    loss_and_norm = ((None, None), (2.0, float("nan")), (None, None), (1.0, float("inf")))
    lines = [
        {"step": step, "loss": loss, "loss_reconstruction": loss, "grad_norm": norm, "clips_per_second": None}
        for step, (loss, norm) in enumerate(loss_and_norm)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = write_page(run.report, title="x", run=run).read_text(encoding="utf-8")
    assert len(svg_points(re.search(r"<svg.*?</svg>", content, re.DOTALL)[0], "line a")) == 2
    text = Elements(content).text
    assert "Reconstruction loss" in text
    for absent in ("Gradient norm", "clips/s", "mean of the last", "nan", "None"):
        assert absent not in text


LEGEND = 10
"""Cells below the map, from 0 to the largest share."""


def sampler_lines(count=30, slots=4):
    """Lines of a run whose visible tokens wander from the first to the last moment of the clip."""
    for step in range(1, count + 1):
        last = step / count / 2
        shares = [0.5 - last, *[0.5 / (slots - 2)] * (slots - 2), last]
        yield {
            "step": step,
            "loss": 1.0,
            "probability_entropy": 5.0 - step / 30,
            "probability_max": 0.01,
            "error_lift": 1 + step / 100,
            "motion_lift": 0.9,
            "sampler_grad_norm": 1e-4,
            "clamped_share": 0.25,
            **{f"visible_in_time/{slot}": share for slot, share in enumerate(shares)},
        }


def page_of(tmp_path, lines, **options):
    run = RunFolder(tmp_path)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_page(run.report, title="x", run=run, **options).read_text(encoding="utf-8")


def test_the_sampler_has_a_part_of_its_own(tmp_path):
    alarm = "Step 30: the <b>sampler</b> has collapsed."
    content = page_of(tmp_path, sampler_lines(), num_tokens=512, alarms=[alarm])
    parsed = Elements(content)
    assert alarm in parsed.text
    part = parsed.text[parsed.text.index(alarm) :]
    for title in ("Entropy", "Largest prob", "Error lift", "Motion lift", "Gradient norm of", "Share of masked tokens"):
        assert title in part
    assert part.count("uniform") == part.count("ignores the error") == part.count("ignores motion") == 1
    assert "last 0 to 50 %" in part
    assert ("p", {"class": "alarm"}) in parsed.elements
    assert content.count('class="cell"') == 4 * 30 + LEGEND


def test_a_run_without_a_sampler_has_the_map_of_its_masks(tmp_path):
    kept = ("step", "visible_in_time")
    masks = [{name: line[name] for name in line if name.startswith(kept)} for line in sampler_lines()]
    parsed = Elements(page_of(tmp_path, masks, num_tokens=512))
    assert parsed.text.count("Mask") == 1
    assert "Sampler" not in parsed.text
    assert "lift" not in parsed.text


@pytest.mark.parametrize("zeros", [{}, {"probability_entropy": 0.0, "probability_max": 0.0}])
def test_runs_from_before_the_samplers_figures_have_no_such_part(tmp_path, zeros):
    content = page_of(tmp_path, [{"step": step, "loss_reconstruction": 1.0, **zeros} for step in (1, 2)])
    assert "Sampler" not in content
    assert content.count("<h2>") == 1


def test_lines_without_shares_and_a_single_one_draw_no_map(tmp_path):
    one, *others = sampler_lines(3)
    torn = [{**line, "visible_in_time/1": None} for line in others]
    assert "visible tokens" not in page_of(tmp_path, [one, *torn])
    assert page_of(tmp_path, [one, *torn, {**one, "step": 9}]).count('class="cell"') == 2 * 4 + LEGEND


def test_share_map_is_in_proportion():
    steps, shares = [10, 20, 40], [[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]
    root = ElementTree.fromstring(str(share_map(steps, shares, label="x")))
    cells = [e for e in root if e.get("class") == "cell"][:-LEGEND]
    assert [float(e.get("fill-opacity")) for e in cells] == [0.5, 0.25, 1.0, 0.5, 0.75, 0.0]
    widths = [float(e.get("width")) for e in cells]
    assert np.array(widths[:3]) / widths[0] == pytest.approx([1, 3, 2], rel=0.01)
    assert widths[:3] == widths[3:]
    assert len({e.get("y") for e in cells}) == 2
    ends = [float(e.get("x")) + float(e.get("width")) for e in cells]
    assert ends[0] == pytest.approx(float(cells[1].get("x")), abs=0.11)
    many = share_map(range(1000), [[1.0, 0.0]] * 1000, label="x")
    assert many.count('class="cell"') <= 2 * 96 + LEGEND
    assert ">0 %</text>" in many
    assert ">100 %</text>" in many


def test_a_reference_is_a_line_in_view_whatever_the_values():
    for height, values in ((9.0, [1.0, 2.0]), (-9.0, [1.0, 2.0])):
        svg = str(line_chart([1, 2], values, label="x", reference=(height, "level")))
        (line,) = [e for e in ElementTree.fromstring(svg).iter() if e.get("class") == "reference"]
        assert line.get("y1") == line.get("y2")
        assert 0 < float(line.get("y1")) < 210
        assert (float(line.get("y1")) < svg_points(svg, "line a")[:, 1].min()) == (height > 0)
        (words,) = [e for e in ElementTree.fromstring(svg).iter() if e.text == "level"]
        assert 0 < float(words.get("y")) < 210 - 26  # inside the chart, not among the steps below it


def test_adaptivity_bars_are_in_proportion_and_marked():
    root = ElementTree.fromstring(str(adaptivity_bars(ADAPTIVITY)))
    widths = [float(e.get("width")) for e in root.iter() if (e.get("class") or "").startswith("bar")]
    assert np.array(widths) / widths[0] == pytest.approx(np.array([1.84, 1.17, 1.01]) / 1.84, rel=0.01)
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert [text for text in texts if text.isalpha()] == ["Trained", "Untrained", "Random"]
    assert [text for text in texts if "±" in text] == ["1.84× ± 0.06", "1.17× ± 0.03", "1.01× ± 0.02"]
    single = {**ADAPTIVITY, "adaptive": {"value": 1.5, "standard_error": None}}
    assert ">1.50×<" in adaptivity_bars(single)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.61344, "0.613"), (1.5e-4, "1.5e-4"), (1e-5, "1e-5"), (31.61, "31.6"), (600, "600"), (12000, "12k")],
)
def test_numbers_are_compact(value, text):
    assert compact_number(value) == text


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
<script>
addEventListener("load", () => {
  const images = [...document.images].map(image => image.naturalWidth + "x" + image.naturalHeight);
  const outside = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
  const overflow = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  document.body.innerHTML = "PROBE " + images.join(" ") + " outside=" + outside.length + " overflow=" + overflow;
});
</script>
"""


DEMO = Path(__file__).parents[2] / "runs" / "demo" / "report.html"
in_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome on this machine: the page is not opened in a browser"
)


def open_in_browser(page, tmp_path, width):
    """Sizes of the page's images, requests to elsewhere and whether it is too wide, when it is open and quiet."""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        " --disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr --dump-dom"
    )
    result = subprocess.run(
        [
            BROWSER,
            *switches.split(),
            f"--window-size={width},900",
            f"--user-data-dir={tmp_path / 'profile'}",
            probed.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in result.stderr
    *sizes, outside, overflow = re.search(r"PROBE ([^<]*)", result.stdout)[1].split()
    return sizes, outside, overflow


@in_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_page_opens_in_a_browser_without_errors(page, tmp_path, width):
    assert open_in_browser(page, tmp_path, width) == (["1200x700", "700x180"], "outside=0", "overflow=false")


@in_browser
@pytest.mark.skipif(not DEMO.is_file(), reason="runs/demo/report.html is not there: run `make demo` first")
def test_the_demos_own_report_opens_in_a_browser_without_errors(tmp_path):
    sizes, outside, overflow = open_in_browser(DEMO, tmp_path, 1200)
    assert len(sizes) == DEMO.read_text(encoding="utf-8").count("<img ")
    assert len(sizes) >= 2
    assert all(int(width) > 0 for width, _ in (size.split("x") for size in sizes))
    assert (outside, overflow) == ("outside=0", "overflow=false")
