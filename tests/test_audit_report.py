"""audit.json and audit.html of real audits: what they tell, and how they look."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from collections.abc import Callable
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
from fedcore.audit.tables import table, worst_grade
from fedcore.audit.words import attacks_in_words
from tests.audits import Silent
from tests.helpers import PATIENCE
from tests.pages import CHROMIUM, Page, browse, titles

FEW = {"sme": {"iterations": 20}, "ig": {"iterations": 20}}
SMALL = {
    "model.name": "mlp",
    "model.hidden": [8],
    "population": 20,
    "participation.name": "uniform",
    "participation.cohort": 8,
    "engine.chunk": 1,
    "rounds": 2,
    "local.batch_size": 4,
}
COMMAND = ["fedcore", "audit", "fedavg", "--set", "model.hidden=[8]"]


def settings(**changes: Any) -> Experiment:
    return Experiment.parse({"method": "fedavg"}, SMALL | changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """A sweep over local epochs and examples: four cells."""
    plan, out = Plan(options=FEW, clients=2), tmp_path_factory.mktemp("audit")
    cells = sweep(settings(), plan, [1, 3], [4], [4, 8])
    return examine("sweep", settings(), cells, plan, out, Silent())


@pytest.fixture(scope="module")
def defended(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    plan, out = Plan(options=FEW, clients=2), tmp_path_factory.mktemp("audit")
    wanted = ["none", "clip=1 noise_multiplier=0.1", "secagg=2"]
    cells = defences(settings(), plan, wanted, out)
    return examine("defences", settings(), cells, plan, out, Silent())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """An audit of a run whose clients keep the output layer."""
    folder, plan = tmp_path_factory.mktemp("runs") / "run", Plan(options=FEW, clients=2)
    method = {"name": "fedsim", "personal": ["output"]}
    run(Experiment.parse({"method": method}, SMALL | {"audit.capture": 2}), out=folder)
    experiment, cells = rounds_of(folder, plan)
    return examine("captured", experiment, cells, plan, folder / "audit", Silent())


@pytest.fixture(params=["swept", "defended", "kept"])
def audit(request: pytest.FixtureRequest) -> Audit:
    found: Audit = request.getfixturevalue(request.param)
    return found


def changed(audit: Audit, change: Callable[[dict[str, Any]], None]) -> Audit:
    """A copy whose cells went through `change`."""
    cells = copy.deepcopy(audit.cells)
    for cell in cells:
        change(cell)  # type: ignore[arg-type]
    return replace(audit, cells=cells)


DRAWN: dict[int, str] = {}  # pages by the identity of their audit


def drawn(audit: Audit, tmp_path: Path) -> Path:
    """Its audit.html; that of one audit is drawn once."""
    if id(audit) not in DRAWN:
        DRAWN[id(audit)] = report.page(audit, COMMAND)
    file = tmp_path / "audit.html"
    file.write_text(DRAWN[id(audit)])
    return file


def words(audit: Audit, tmp_path: Path) -> str:
    return Page(report.write(audit, tmp_path, COMMAND)).words


def standard_json(text: str) -> Any:
    """The value; NaN and infinity, which are no JSON, fail the test."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))


# audit.json


def test_json_is_what_was_found_without_a_picture(audit: Audit, tmp_path: Path) -> None:
    report.write(audit, tmp_path, COMMAND)
    text = (tmp_path / "audit.json").read_text()
    found = standard_json(text)
    assert found == report.ready(audit) == json.loads(json.dumps(audit.to_dict()))
    assert "iVBOR" not in text
    assert "pictures" not in text
    assert any(cell["pictures"] for cell in audit.cells)


def test_values_that_are_not_finite_are_null(swept: Audit, tmp_path: Path) -> None:
    def spoil(cell: dict[str, Any]) -> None:
        cell["clients"][0]["delta_norm"] = math.inf
        cell["clients"][1]["attacks"]["ig"]["ssim"]["min"] = math.nan

    report.write(changed(swept, spoil), tmp_path, COMMAND)
    found = standard_json((tmp_path / "audit.json").read_text())
    first, second = found["cells"][0]["clients"]
    assert first["delta_norm"] is None
    assert second["attacks"]["ig"]["ssim"]["min"] is None


def test_files_are_the_owners_alone(swept: Audit, tmp_path: Path) -> None:
    report.write(swept, tmp_path, COMMAND)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {"audit.json": 0o600, "audit.html": 0o600}


# audit.html


def test_page_needs_nothing_from_outside_and_has_no_script(
    audit: Audit, tmp_path: Path
) -> None:
    page = Page(drawn(audit, tmp_path))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    ids = []
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "xlink:href", "src") and not value.startswith("#"):
            assert value.startswith("data:image/png;base64,")
        if name == "id":
            ids.append(value)
    assert len(ids) == len(set(ids))


def test_every_picture_decodes_originals_over_what_was_rebuilt(
    audit: Audit, tmp_path: Path
) -> None:
    page = Page(drawn(audit, tmp_path))
    sources = [value for name, value in page.attributes if name == "src"]
    pictures = [source.partition(",")[2] for source in sources]
    expected = []
    for cell in audit.cells:
        for shown in cell["pictures"]:
            for original, rebuilt, psnr in shown["pairs"]:
                expected += [original, rebuilt]
                assert f"{psnr:.1f}" in page.words
    assert pictures == expected
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture, validate=True)))
        image.load()
        assert image.size == (8, 8)
    described = [name for name, _ in page.attributes if name == "alt"]
    assert page.tags.count("img") == len(pictures) == len(described)


def test_page_tells_the_adversary_the_verdict_and_the_command(
    swept: Audit, tmp_path: Path
) -> None:
    text = Page(drawn(swept, tmp_path)).words
    assert swept.worst is not None
    for part in (
        f"grade {worst_grade(swept.clients)}: ",
        f"input leakage {swept.worst.input_leakage:.0f} out of 100",
        "the change of all 610 parameters of the model",
        "How many examples the client has, as it reported: 4 to 8.",
        "No labels: they were worked out from the update.",
        "not broken by these attacks at this budget",
        "Personal data.",
        "fedcore audit fedavg --set 'model.hidden=[8]'",
        "Zhu, Yao, Blaschko, ICML 2023",
    ):
        assert part in text
    assert " safe." not in text.replace("no grade says that a client is safe.", "")


def test_every_attack_is_told_by_its_paper(swept: Audit) -> None:
    everything = replace(swept, plan={"attacks": ["sme", "dlfa", "labels"]})
    lines = dict(attacks_in_words(everything))
    assert lines["sme"].endswith("(Zhu, Yao, Blaschko, ICML 2023)")
    assert lines["dlfa"].endswith("(Dimitrov et al., TMLR 2022)")
    assert lines["labels"].startswith("Labels from the output layer")


def test_table_has_every_attack_beside_the_reference_levels(swept: Audit) -> None:
    head, *rows = table(swept)
    assert head == [
        "",
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
        of_cell = {row[1]: row for row in rows[8 * i : 8 * i + 8]}
        assert rows[8 * i][0] == cell["name"]
        psnr = cell["summary"]["attacks"]["sme"]["psnr"]
        expected = f"{psnr['mean']:.1f} [{psnr['low']:.1f}, {psnr['high']:.1f}]"
        assert of_cell["sme"][2] == expected
        level = cell["summary"]["references"]["mean image"]["psnr"]
        assert of_cell["mean image"][2] == f"{level:.1f}"
        # It has neither alpha nor an objective.
        assert of_cell["analytic"][5:7] == ["-", "-"]


def test_sweep_is_drawn_against_what_varied(swept: Audit, tmp_path: Path) -> None:
    figures = [title for title in titles(drawn(swept, tmp_path)) if ", by " in title]
    assert figures == [
        "What comes back, by local epochs",
        "Labels and membership, by local epochs",
        "What comes back, by examples of a client",
        "Labels and membership, by examples of a client",
    ]
    assert "Objective along the way" in titles(drawn(swept, tmp_path))
    four = [cell for cell in swept.cells if cell["factors"]["examples"] == 4]
    file = report.write(replace(swept, cells=four), tmp_path, COMMAND)
    assert "What comes back, by local steps" in titles(file)


def test_reference_levels_are_in_the_curves(swept: Audit, tmp_path: Path) -> None:
    pictures = re.findall(r"<svg.*?</svg>", drawn(swept, tmp_path).read_text(), re.S)
    for level in ("class means", "mean image", "blank", "start noise"):
        assert level in pictures[0]
    assert "stroke-dasharray" in pictures[0]
    # Colours are the page's, which has two modes.
    assert not re.findall(r"#[0-9a-f]{6}\b", "".join(pictures))


def test_defences_are_weighed_against_accuracy(defended: Audit, tmp_path: Path) -> None:
    text = Page(drawn(defended, tmp_path)).words
    assert "Privacy against accuracy" in text
    head, plain, noisy, together = table(defended)
    assert head[0] == "defence"
    assert (plain[0], plain[-1]) == ("none", "-")
    assert float(noisy[-1]) > 0
    assert noisy[-2] == f"{defended.cells[1]['accuracy']:.1%}"
    assert together[0] == "secagg=2"
    assert "Under secure aggregation only the mean over 2 clients, in the" in text
    assert "and 1 more" in text


def test_epsilon_of_another_view_is_never_printed(
    defended: Audit, tmp_path: Path
) -> None:
    def central(cell: dict[str, Any]) -> None:
        if cell["privacy"] is not None:
            cell["privacy"]["view"] = "global_model"

    other = changed(defended, central)
    assert table(other)[2][-1] == "global model only"
    epsilon = table(defended)[2][-1]
    assert f">{epsilon}<" not in report.write(other, tmp_path, COMMAND).read_text()


def test_lowest_leakage_is_named_with_its_cost(defended: Audit) -> None:
    def cell(name: str, leakage: float, accuracy: float) -> Any:
        summary = {"input_leakage": {"mean": leakage, "low": None, "high": None}}
        values = {"summary": summary, "accuracy": accuracy, "personal": False}
        return {"name": name, **values}

    cells = [cell("none", 80, 0.9), cell("much", 2, 0.7), cell("little", 30, 0.89)]
    assert measured(replace(defended, cells=cells)) == [
        'Measured here, lowest leakage: "much" takes input leakage from 80 to 2 out of '
        "100, at 20.0 points of accuracy.",
        "Measured here, lowest of those that cost at most 2 points: "
        '"little" takes input leakage from 80 to 30 out of 100, at 1.0 points of '
        "accuracy.",
    ]
    cells = [cell("none", 2, 0.9), cell("much", 3, 0.7)]
    assert measured(replace(defended, cells=cells)) == [
        "None of the defences measured here lowers the input leakage."
    ]


def test_parameters_that_stay_on_the_client_were_not_seen(
    kept: Audit, tmp_path: Path
) -> None:
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
    "nothing": [],
}


@pytest.mark.parametrize("leak", ADVICE)
def test_advice_is_by_what_leaked(swept: Audit, leak: str) -> None:
    client: Any = copy.deepcopy(swept.clients[0])
    client["grade"] = "D" if leak == "inputs" else "A"
    client["labels"]["grade"] = "C" if leak == "labels" else "A"
    client["membership"]["grade"] = "C" if leak == "membership" else "A"
    client["best"]["attack"] = "sme"
    names = remedies_for(client, swept.experiment)
    assert [REMEDIES[name].short for name in names] == ADVICE[leak]


def test_nothing_back_is_not_called_safe(swept: Audit, tmp_path: Path) -> None:
    def harmless(cell: dict[str, Any]) -> None:
        for client in cell["clients"]:
            client |= {"grade": "A", "input_leakage": 1.0, "worst_image": 2.0}
            client["labels"]["grade"] = client["membership"]["grade"] = "A"

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
    warnings, cells = ["<b>odd</b> & warned of"], swept.cells[:1]
    stopped = replace(swept, interrupted=True, cells=cells, warnings=warnings)
    text = words(stopped, tmp_path)
    assert "This audit was interrupted" in text
    assert "<b>odd</b> & warned of." in text  # shown, not obeyed
    assert words(replace(stopped, cells=[]), tmp_path)


def test_only_the_worst_of_many_cells_is_unfolded(swept: Audit, tmp_path: Path) -> None:
    page = drawn(swept, tmp_path).read_text()
    assert page.count("<details open>") == 1
    assert swept.worst is not None
    assert f"<details open><summary>{swept.worst.cell}" in page


def test_the_same_audit_gives_the_same_bytes(swept: Audit, tmp_path: Path) -> None:
    first = report.write(swept, tmp_path, COMMAND).read_bytes()
    assert report.write(swept, tmp_path, COMMAND).read_bytes() == first


# In a browser

PROBE = """
<script>
const tell = message => parent.postMessage(message, "*");
addEventListener("error", error => tell({error: String(error.message)}));
addEventListener("load", () => {
  const images = [...document.images];
  const wide = image => image.getBoundingClientRect().width > 20;
  const resources = performance.getEntriesByType("resource");
  tell({
    overflow: document.documentElement.scrollWidth - innerWidth,
    images: images.map(image => image.complete && image.naturalWidth),
    shown: images.filter(wide).length,
    loaded: resources.filter(entry => !entry.name.startsWith("data:")).length,
  });
});
</script>
"""
FRAME = """
<body style="margin: 0">
<iframe style="border: 0; width: {width}px; height: 3000px" src="{address}"></iframe>
<pre></pre>
<script>
const heard = document.querySelector("pre");
addEventListener("message", event => heard.append(JSON.stringify(event.data)));
</script>
"""
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
@in_a_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_browser_shows_every_image_and_nothing_overflows(
    audit: Audit, tmp_path: Path, width: int
) -> None:
    # The page has no scripts of its own: a copy is asked.
    text = drawn(audit, tmp_path).read_text()
    text = text.replace("<details>", "<details open>")
    probed, frame = tmp_path / "probed.html", tmp_path / "frame.html"
    probed.write_text(text.replace("</body>", f"{PROBE}</body>"))
    frame.write_text(FRAME.format(width=width, address=probed.resolve().as_uri()))
    budget = ("--virtual-time-budget=10000", "--dump-dom")
    dom = browse(tmp_path / "profile", *budget, frame.resolve().as_uri())
    told = re.search(r"<pre>(.*?)</pre>", dom, re.S)
    assert told is not None
    found = json.loads(told[1])
    assert found["overflow"] <= 0, f"{found['overflow']} pixels wider than {width}"
    pairs = 0
    for cell in audit.cells:
        pairs += sum(len(shown["pairs"]) for shown in cell["pictures"])
    assert found["images"] == [8] * 2 * pairs
    assert found["shown"] == len(found["images"]) > 0
    assert found["loaded"] == 0


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
def test_browser_draws_the_page_in_both_modes_without_a_word_on_the_console(
    swept: Audit, tmp_path: Path, dark: bool
) -> None:
    address = drawn(swept, tmp_path).resolve().as_uri()
    picture, console = tmp_path / "audit.png", tmp_path / "console"
    mode = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    shot = (f"--screenshot={picture}", "--window-size=1200,2400")
    browse(tmp_path / "a", mode, *shot, address)
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert (np.median(pixels) < 80) == dark, "the page ignores the reader's mode"
    assert (pixels.std(1) > 3).mean() > 0.5, "most of the page is empty"
    logging = ("--enable-logging", f"--log-file={console}", "--v=0", "--dump-dom")
    browse(tmp_path / "b", *logging, address)
    assert "CONSOLE" not in console.read_text()
