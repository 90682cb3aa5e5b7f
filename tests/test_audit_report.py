"""audit.json and audit.html of real audits, also in a browser.

They tell what was found, and keep the clients' data to themselves.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedcore import Experiment, run
from fedcore.audit import report
from fedcore.audit.advice import REMEDIES, measured, remedies_for
from fedcore.audit.cells import rounds_of, sweep
from fedcore.audit.examine import examine
from fedcore.audit.plan import Plan
from fedcore.audit.remedies import defences
from fedcore.audit.results import Audit
from fedcore.audit.tables import worst_grade
from fedcore.rounds import loop
from tests.pages import CHROMIUM, Page, browse

FEW = {"sme": {"iterations": 20}, "ig": {"iterations": 20}}
SMALL = {
    "model.name": "mlp",
    "model.hidden": [8],
    "population": 20,
    "participation.name": "uniform",
    "engine.chunk": 1,
}
SMALL |= {"participation.cohort": 8, "rounds": 2, "local.batch_size": 4}
COMMAND = ["fedcore", "audit", "fedavg", "--set", "model.hidden=[8]"]


class Silent:
    """An observer of an audit that watches nothing."""

    def cell(self, number: int, cells: int, name: str) -> None:
        pass

    def progress(self, share: float, what: str, objective: float | None) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def training(self) -> loop.Observer:
        return loop.Quiet()


def settings(**changes: Any) -> Experiment:
    return Experiment.parse({"method": "fedavg"}, SMALL | changes)


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """A sweep over local epochs and examples: four cells."""
    plan = Plan(options=FEW, clients=2)
    out = tmp_path_factory.mktemp("audit")
    return examine(
        "sweep",
        settings(),
        sweep(settings(), plan, [1, 3], [4], [4, 8]),
        plan,
        out,
        Silent(),
    )


@pytest.fixture(scope="session")
def defended(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    plan, out = Plan(options=FEW, clients=2), tmp_path_factory.mktemp("audit")
    wanted = ["none", "clip=1 noise_multiplier=0.1", "secagg=2"]
    return examine(
        "defences",
        settings(),
        defences(settings(), plan, wanted, out),
        plan,
        out,
        Silent(),
    )


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """An audit of a run whose clients keep the output layer."""
    folder, plan = tmp_path_factory.mktemp("runs") / "run", Plan(options=FEW, clients=2)
    e = Experiment.parse(
        {"method": {"name": "fedsim", "personal": ["output"]}},
        SMALL | {"audit.capture": 2},
    )
    run(e, out=folder)
    e, cells = rounds_of(folder, plan)
    return examine("captured", e, cells, plan, folder / "audit", Silent())


@pytest.fixture(params=["swept", "defended", "kept"])
def audit(request: pytest.FixtureRequest) -> Audit:
    found: Audit = request.getfixturevalue(request.param)
    return found


def changed(a: Audit, change: Any) -> Audit:
    """A copy whose cells went through `change`."""
    cells = copy.deepcopy(a.cells)
    for cell in cells:
        change(cell)
    return replace(a, cells=cells)


DRAWN: dict[int, str] = {}


def drawn(a: Audit, tmp_path: Path) -> Path:
    """Its audit.html; that of one audit is drawn once."""
    if id(a) not in DRAWN:
        DRAWN[id(a)] = report.page(a, COMMAND)
    file = tmp_path / "audit.html"
    file.write_text(DRAWN[id(a)])
    return file


def words(a: Audit, tmp_path: Path) -> str:
    return Page(report.write(a, tmp_path, COMMAND)).words


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers(inner)]
    if isinstance(value, list):
        return [n for inner in value for n in numbers(inner)]
    return [value] if isinstance(value, float) else []


# audit.json


def test_json_is_what_was_found_without_a_picture(audit: Audit, tmp_path: Path) -> None:
    report.write(audit, tmp_path, COMMAND)
    text = (tmp_path / "audit.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert found == report.ready(audit) == json.loads(json.dumps(audit.to_dict()))
    assert "iVBOR" not in text
    assert "pictures" not in text
    assert any(cell["pictures"] for cell in audit.cells)


def test_what_is_not_finite_is_null(swept: Audit, tmp_path: Path) -> None:
    def spoil(cell: dict[str, Any]) -> None:
        cell["clients"][0]["delta_norm"] = math.inf
        cell["clients"][1]["attacks"]["ig"]["ssim"]["min"] = math.nan

    report.write(changed(swept, spoil), tmp_path, COMMAND)
    found = json.loads(
        (tmp_path / "audit.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"bare {name}"),
    )
    assert found["cells"][0]["clients"][0]["delta_norm"] is None
    assert all(map(math.isfinite, numbers(found)))


def test_files_are_the_owners_alone(swept: Audit, tmp_path: Path) -> None:
    report.write(swept, tmp_path, COMMAND)
    assert {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {
        "audit.json": 0o600,
        "audit.html": 0o600,
    }


# audit.html


def test_page_needs_nothing_from_outside_and_has_no_script(
    audit: Audit, tmp_path: Path
) -> None:
    page = Page(drawn(audit, tmp_path))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [
        value
        for name, value in page.attributes
        if name in ("href", "xlink:href", "src") and not value.startswith("#")
    ]
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_every_picture_decodes_originals_over_what_was_rebuilt(
    audit: Audit, tmp_path: Path
) -> None:
    page = Page(drawn(audit, tmp_path))
    pictures = [
        value.partition(",")[2] for name, value in page.attributes if name == "src"
    ]
    pairs = [
        pair
        for cell in audit.cells
        for shown in cell["pictures"]
        for pair in shown["pairs"]
    ]
    assert pictures == [picture for pair in pairs for picture in pair[:2]]
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture, validate=True)))
        image.load()
        assert image.size == (8, 8)
    assert (
        page.tags.count("img")
        == len(pictures)
        == sum(name == "alt" for name, _ in page.attributes)
    )
    assert all(f"{psnr:.1f}" in page.words for *_, psnr in pairs)


def test_page_tells_the_adversary_the_verdict_and_the_command(
    swept: Audit, tmp_path: Path
) -> None:
    text = Page(drawn(swept, tmp_path)).words
    grade = worst_grade([c for cell in swept.cells for c in cell["clients"]])
    assert f"grade {grade}: " in text
    assert f"input leakage {swept.worst.input_leakage:.0f} out of 100" in text
    assert "the change of all 610 parameters of the model" in text
    assert "How many examples the client has, as it reported: 4 to 8." in text
    assert "No labels: they were worked out from the update." in text
    assert "not broken by these attacks at this budget" in text
    assert "Personal data." in text
    assert "fedcore audit fedavg --set 'model.hidden=[8]'" in text
    assert "Zhu, Yao, Blaschko, ICML 2023" in text
    assert " safe." not in text.replace("no grade says that a client is safe.", "")


def test_table_has_every_attack_beside_the_reference_levels(swept: Audit) -> None:
    head, *rows = report.table(swept)
    assert head[1:] == [
        "attack",
        "PSNR dB [95 % CI]",
        "SSIM",
        "found",
        "alpha",
        "objective",
        "labels",
        "members AUC",
    ]
    assert len(rows) == 4 * (3 + 5)
    for i, cell in enumerate(swept.cells):
        own = {row[1]: row for row in rows[8 * i : 8 * i + 8]}
        assert rows[8 * i][0] == cell["name"]
        stat = cell["summary"]["attacks"]["sme"]["psnr"]
        assert (
            own["sme"][2]
            == f"{stat['mean']:.1f} [{stat['low']:.1f}, {stat['high']:.1f}]"
        )
        assert (
            own["mean image"][2]
            == f"{cell['summary']['references']['mean image']['psnr']:.1f}"
        )
        assert own["analytic"][5:7] == [
            "-",
            "-",
        ]  # it has neither alpha nor an objective


def test_sweep_is_drawn_against_what_varied(swept: Audit, tmp_path: Path) -> None:
    titles = re.findall(r"<h3>(.*?)</h3>", drawn(swept, tmp_path).read_text())
    expected = [
        f"{what}, by {by}"
        for by in ("local epochs", "examples of a client")
        for what in ("What comes back", "Labels and membership")
    ]
    assert [title for title in titles if ", by " in title or "along" in title] == [
        *expected,
        "Objective along the way",
    ]
    one = replace(
        swept, cells=[cell for cell in swept.cells if cell["factors"]["examples"] == 4]
    )
    assert (
        "What comes back, by local steps"
        in report.write(one, tmp_path, COMMAND).read_text()
    )


def test_reference_levels_are_in_the_curves(swept: Audit, tmp_path: Path) -> None:
    pictures = re.findall(r"<svg.*?</svg>", drawn(swept, tmp_path).read_text(), re.S)
    for level in ("class means", "mean image", "blank", "start noise"):
        assert level in pictures[0]
    assert "stroke-dasharray" in pictures[0]
    assert (
        set(re.findall(r"#[0-9a-f]{6}\b", "".join(pictures))) == set()
    )  # colours are the page's, in both modes


def test_defences_are_weighed_against_accuracy(defended: Audit, tmp_path: Path) -> None:
    text = Page(drawn(defended, tmp_path)).words
    assert "Privacy against accuracy" in text
    head, plain, noisy, together = report.table(defended)
    assert head[0] == "defence"
    assert (plain[0], plain[-1]) == ("none", "-")
    assert float(noisy[-1]) > 0
    assert noisy[-2] == f"{defended.cells[1]['accuracy']:.1%}"
    assert together[0] == "secagg=2"
    assert (
        "Under secure aggregation only the mean over 2 clients, "
        "in the cells that say so." in text
    )
    assert "and 1 more" in text


def test_epsilon_of_another_view_is_never_printed(
    defended: Audit, tmp_path: Path
) -> None:
    def central(cell: dict[str, Any]) -> None:
        if cell["privacy"] is not None:
            cell["privacy"]["view"] = "global_model"

    a = changed(defended, central)
    assert report.table(a)[2][-1] == "global model only"
    epsilon = report.table(defended)[2][-1]
    assert f">{epsilon}<" not in report.write(a, tmp_path, COMMAND).read_text()


def test_lowest_leakage_is_named_with_its_cost(defended: Audit) -> None:
    def leak(value: float, accuracy: float) -> dict[str, Any]:
        return {
            "summary": {"input_leakage": {"mean": value, "low": None, "high": None}},
            "accuracy": accuracy,
            "personal": False,
        }

    cells = [
        {"name": "none", **leak(80, 0.9)},
        {"name": "much", **leak(2, 0.7)},
        {"name": "little", **leak(30, 0.89)},
    ]
    assert measured(replace(defended, cells=cells)) == [
        'Measured here, lowest leakage: "much" takes input leakage from 80 to 2 out of '
        "100, at 20.0 points of accuracy.",
        'Measured here, lowest of those that cost at most 2 points: "little" takes '
        "input leakage from 80 to 30 out of 100, at "
        "1.0 points of accuracy.",
    ]
    worse = [{"name": "none", **leak(2, 0.9)}, {"name": "much", **leak(3, 0.7)}]
    assert measured(replace(defended, cells=worse)) == [
        "None of the defences measured here lowers the input leakage."
    ]


def test_what_stays_on_the_client_was_not_seen(kept: Audit, tmp_path: Path) -> None:
    text = Page(drawn(kept, tmp_path)).words
    assert "the change of 520 of the 610 parameters of the model" in text
    assert "The parameters that stay on the client, or were not sent: 90." in text
    assert "Labels: not recovered, the output layer's" in text
    assert "personal layers" not in text.partition("Verdict by client")[2]
    assert "Objective along the way" in text


ADVICE = {
    "inputs": [
        "clipping and noise",
        "secure aggregation",
        "personal layers",
        "more local steps",
        "larger batches",
    ],
    "labels": ["clipping and noise", "secure aggregation", "personal layers"],
    "membership": [
        "clipping and noise",
        "secure aggregation",
        "larger batches",
        "less training on the same examples",
    ],
}


@pytest.mark.parametrize("leak", [*ADVICE, "nothing"])
def test_advice_is_by_what_leaked(swept: Audit, leak: str) -> None:
    c = copy.deepcopy(swept.cells[0]["clients"][0])
    c["grade"] = "D" if leak == "inputs" else "A"
    c["labels"]["grade"] = "C" if leak == "labels" else "A"
    c["membership"]["grade"] = "C" if leak == "membership" else "A"
    c["best"]["attack"] = "sme"
    found = [REMEDIES[name].short for name in remedies_for(c, swept.experiment)]
    assert found == ADVICE.get(leak, [])


def test_nothing_back_is_not_called_safe(swept: Audit, tmp_path: Path) -> None:
    def harmless(cell: dict[str, Any]) -> None:
        for c in cell["clients"]:
            c |= {"grade": "A", "input_leakage": 1.0, "worst_image": 2.0}
            c["labels"]["grade"] = c["membership"]["grade"] = "A"

    text = words(changed(swept, harmless), tmp_path)
    assert "grade A: nothing recognisable came back" in text
    assert (
        "not broken by these attacks at this budget. It is no proof that no attack can."
        in text
    )
    assert "What to switch on" not in text


def test_interrupted_audit_says_so_and_warnings_are_notes(
    swept: Audit, tmp_path: Path
) -> None:
    a = replace(
        swept,
        interrupted=True,
        cells=swept.cells[:1],
        warnings=["<b>odd</b> & warned of"],
    )
    text = words(a, tmp_path)
    assert "This audit was interrupted" in text
    assert "<b>odd</b> & warned of." in text  # shown, not obeyed
    assert words(replace(a, cells=[]), tmp_path)


def test_only_the_worst_of_many_cells_is_unfolded(swept: Audit, tmp_path: Path) -> None:
    page = drawn(swept, tmp_path).read_text()
    assert page.count("<details open>") == 1
    assert f"<details open><summary>{swept.worst.cell}" in page


def test_the_same_audit_gives_the_same_bytes(swept: Audit, tmp_path: Path) -> None:
    assert (
        report.write(swept, tmp_path, COMMAND).read_bytes()
        == report.write(swept, tmp_path, COMMAND).read_bytes()
    )


# In a browser

PROBE = """<script>addEventListener("load", () => parent.postMessage({
  overflow: document.documentElement.scrollWidth - innerWidth,
  images: [...document.images].map(image => image.complete && image.naturalWidth),
  shown: [...document.images].filter(
    image => image.getBoundingClientRect().width > 20).length,
  loaded: performance.getEntriesByType("resource").filter(
    entry => !entry.name.startsWith("data:")).length,
}, "*"));
addEventListener("error", error =>
  parent.postMessage({error: String(error.message)}, "*"));</script>"""
FRAME = """<body style="margin: 0">
<iframe style="border: 0; width: {width}px; height: 3000px" src="{address}"></iframe>
<pre></pre>
<script>addEventListener("message", event =>
  document.querySelector("pre").append(JSON.stringify(event.data)))</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_browser_shows_every_image_and_nothing_overflows(
    audit: Audit, tmp_path: Path, width: int
) -> None:
    page = drawn(audit, tmp_path)
    probed = (
        tmp_path / "probed.html"
    )  # the page has no scripts of its own: a copy is asked
    probed.write_text(
        page.read_text()
        .replace("<details>", "<details open>")
        .replace("</body>", f"{PROBE}</body>")
    )
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, address=probed.resolve().as_uri()))
    dom = browse(
        tmp_path / "profile",
        "--virtual-time-budget=10000",
        "--dump-dom",
        frame.resolve().as_uri(),
    )
    told = re.search(r"<pre>(.*?)</pre>", dom, re.S)
    assert told is not None
    found = json.loads(told[1])
    assert found["overflow"] <= 0, f"{found['overflow']} pixels wider than {width}"
    assert found["images"] == [8] * sum(
        2 * len(shown["pairs"]) for cell in audit.cells for shown in cell["pictures"]
    )
    assert found["shown"] == len(found["images"]) > 0
    assert found["loaded"] == 0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_browser_draws_the_page_in_both_modes_without_a_word_on_the_console(
    swept: Audit, tmp_path: Path, dark: bool
) -> None:
    page = drawn(swept, tmp_path)
    picture = tmp_path / "audit.png"
    mode = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
    browse(
        tmp_path / "a",
        mode,
        f"--screenshot={picture}",
        "--window-size=1200,2400",
        page.resolve().as_uri(),
    )
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert (np.median(pixels) < 80) == dark, (
        "the page does not follow the reader's mode"
    )
    assert (pixels.std(1) > 3).mean() > 0.5, "most of the page is empty"
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'b'}",
    ]
    command += [
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        page.resolve().as_uri(),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
