"""The page of one run: while it trains, when it has finished, and when its records have strange names."""

import json
import re
import sys
import time

import numpy as np
import pytest

from configs import nyu
from mtl_sparse.jobs import report
from mtl_sparse.report import records, run_page, study, study_plots, web
from mtl_sparse.report.schema import Headline, LayerSparsity, Results, RunSparsity
from mtl_sparse.runtime import files
from mtl_sparse.runtime.labels import VOID
from tests.conftest import raises

STEPS = (10, 20, 30)
TASKS = ("segmentation", "depth")
HEADLINES = {
    "segmentation": Headline("segmentation/miou", higher_is_better=True),
    "depth": Headline("depth/mae_normalized", higher_is_better=False),
}
LAYERS = (
    LayerSparsity("backbone/stem_conv1/kernel", 3, 0, 9),
    LayerSparsity("backbone/layer1_0/conv1/kernel", 8, 6, 9),
)
SPARSITY = RunSparsity(0.55, 0.6, None, 1e-4, 0.5, "group_lasso", (), (), LAYERS)


def write_start(folder, **options):
    """Write the records of a run that trains: config.json and metrics.jsonl; return the folder."""
    config = nyu.get_config()
    config.tasks = TASKS
    config.sparsity.target = 0.5
    config.data.update(options)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    lines = []
    for step in STEPS:
        lines.append(
            {"step": step, "split": "train", "lambda": 1e-4, "segmentation/loss": 9 / step, "depth/loss": 1 / step}
        )
        lines.append({"step": step, "split": "validation", "segmentation/loss": 9.5 / step, "depth/loss": 1.5 / step}
                     | {"segmentation/miou": step / 100, "depth/mae_normalized": 2 / step}
                     | {"sparsity/group": step / 60, "sparsity/parameter": step / 50})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_whole(folder, names=("0001", "0002"), **options):
    """Write the records of a finished run, with its compaction, timings and samples; return the folder."""
    write_start(folder, **options)
    rng = np.random.default_rng(0)
    test = {"segmentation/miou": 0.31, "segmentation/loss": 1.0, "depth/mae_normalized": 0.07}
    values = Results(
        test=test,
        constant={name: 0.2 for name in test},
        headlines=HEADLINES,
        sparsity=SPARSITY,
        size=None,
        step=30,
        seed=0,
        frames={"train": 4},
        config=json.loads((folder / "config.json").read_text()),
        versions={},
        device="1 x cpu",
    ).to_json()
    values["size"] = {
        part: {"parameters": n * 10**6, "macs": n * 10**8} for part, n in (("trained", 8), ("compact", 2))
    }
    files.write_json(folder / "results.json", values)
    names_of = ("parameters", "median_ms", "p90_ms", "speedup", "images_per_second", "gmacs_per_second", "memory_mib")
    rows = [
        {"part": part, "model": model, "batch": 1, "macs": 9, **dict.fromkeys(names_of, 1.5), "parameters": 9}
        for part in ("backbone", "model")
        for model in ("dense", "compact")
    ]
    files.write_json(folder / "benchmark.json", {"device": "cpu", "group_sparsity": 0.55, "rows": rows})
    counts = {"groups": 8, "zero": 6, "groups_after": 2, "zero_after": 0, "parameters": 100, "parameters_after": 25}
    layers = [{"layer": layer, **counts, "macs": 1000, "macs_after": 250, "why": "<i>why</i>"}
              for layer in ("backbone/layer1_0/conv1", "head_depth/conv1")]  # fmt: skip
    (folder / "compact").mkdir()
    files.write_json(folder / "compact" / "compact.json", layers)
    records.write_samples(
        folder,
        images=rng.integers(0, 255, (2, 16, 24, 3), dtype=np.uint8),
        names=names,
        labels={"segmentation": np.full((2, 16, 24), 3, np.int32), "depth": rng.uniform(0.1, 1, (2, 16, 24))},
        predictions={"segmentation": np.eye(5)[np.full((2, 16, 24), 1)], "depth": rng.uniform(size=(2, 16, 24, 1))},
        classes=("wall", "floor & <b>rug</b>"),
    )
    return folder


def headings(text):
    return re.findall(r"<h2 [^>]*>(.*?)</h2>", text)


def titles(text):
    return re.findall("<h3>(.*?)</h3>", text)


def test_a_finished_run_has_every_section(tmp_path):
    text = run_page.write(write_whole(tmp_path / "demo")).read_text()
    assert headings(text) == ["Results", "Training", "Sample predictions", "Where parameters and milliseconds went",
                              "Settings", "How to continue"]  # fmt: skip
    assert titles(text) == ["Losses and metrics", "Sparsity over the run", "Groups per layer", "Dense and compact",
                            "MACs of each layer", "Latency"]  # fmt: skip
    assert "Finished; best validation at step 30." in text and "http-equiv" not in text
    assert "<td>segmentation</td><td>miou ↑</td>" in text and ">0.3100<" in text, "the table of the headlines"
    assert "<small>2.00 M of 8.00 M</small>" in text and "<dd>25.0 %" in text, "what compaction leaves"
    assert text.count("<img ") == 2 * (1 + 2 * len(TASKS)) and "http:" not in text and "https:" not in text


def test_an_l1_run_from_before_zero_weights_were_counted_has_a_page_and_a_report(tmp_path):
    folder = write_whole(tmp_path / "demo")
    values = files.read_json(folder / "results.json")
    values["sparsity"]["penalty"] = values["config"]["sparsity"]["penalty"] = "l1"
    files.write_json(folder / "results.json", values)
    assert "Sparsity over the run" in titles(run_page.write(folder).read_text())
    found = study.read([folder])
    assert study_plots.sparsity_over_steps(found) is None, "what it would show is not known"


def test_an_imported_run_has_every_section_but_the_training(tmp_path):
    """Its checkpoint is of step 0."""
    folder = write_whole(tmp_path / "demo")
    (folder / "metrics.jsonl").unlink()
    values = files.read_json(folder / "results.json")
    files.write_json(folder / "results.json", {**values, "step": 0})
    text = run_page.write(folder).read_text()
    assert headings(text) == ["Results", "Training", "Sample predictions", "Where parameters and milliseconds went",
                              "Settings", "How to continue"]  # fmt: skip
    assert titles(text)[0] == "Groups per layer" and "Imported, not trained here." in text
    assert "--job=compact" in text and "All test metrics" in text and "has not finished" not in text


def test_the_validation_of_a_finished_run_is_that_of_its_best_checkpoint(tmp_path):
    """A metric may be better at another step, as before the sparsity was settled."""
    folder = write_whole(tmp_path / "demo")
    values = files.read_json(folder / "results.json")
    files.write_json(folder / "results.json", {**values, "step": 20})
    (table,) = re.findall(r'<h2 id="results">.*?<table>(.*?)</table>', run_page.write(folder).read_text(), re.DOTALL)
    assert re.findall("<td[^>]*>([^<]*)</td>", table)[4:6] == ["0.2000", "0.3000"], "IoU at steps 20 and 30"
    assert re.findall("<td[^>]*>([^<]*)</td>", table)[10:] == ["0.1000", "0.0667"], "MAE at steps 20 and 30"


def test_settings_are_those_that_differ_from_the_defaults(tmp_path):
    text = run_page.write(write_whole(tmp_path / "demo", num_classes=13)).read_text()
    (table,) = re.findall(r'<h2 id="settings">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    lines = [re.findall("<td[^>]*>(.*?)</td>", line) for line in table.split("</tr>") if line]
    assert lines == [
        ["data.num_classes", "13", "40"],
        ["sparsity.target", "0.5", "0.0"],
        ["tasks", "[&quot;segmentation&quot;, &quot;depth&quot;]",
         "[&quot;segmentation&quot;, &quot;depth&quot;, &quot;normals&quot;]"],
    ]  # fmt: skip


def test_another_package_named_configs_does_not_hide_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "configs", None)
    assert "<td>sparsity.target</td>" in run_page.write(write_whole(tmp_path / "demo")).read_text()


def test_commands_continue_from_the_run(tmp_path):
    folder = write_whole(tmp_path / "my demo")
    text = run_page.write(folder).read_text()
    for job in (" --job=compact", " --job=benchmark", " --job=export", " --job=evaluate", ""):
        assert f"python launch.py &#x27;--config=configs/run.py:{folder}&#x27;{job}</code>" in text


def test_a_run_that_trains_shows_what_is_known_and_reloads(tmp_path):
    folder = write_start(tmp_path / "demo")
    live = run_page.Live(folder, HEADLINES, 60)
    assert live.update(30, SPARSITY)
    text = run_page.path(folder).read_text()
    assert headings(text) == ["Results", "Training", "Settings", "How to continue"]
    assert titles(text) == ["Losses and metrics", "Sparsity over the run", "Groups per layer"]
    assert "step 30 of 60" in text and '<meta http-equiv="refresh" content="30">' in text
    assert re.findall(r'<td class="number">([\d.]*)</td>', text)[:4] == ["0.3000", "0.3000", "0.0667", "0.0667"]
    assert re.findall("<code>(.*?)</code>", text) == [f"python launch.py --config=configs/run.py:{folder}"]
    validated = re.findall(r"<title>validation: (\S+) \(step (\d+)\)</title>", text)
    assert [value for value, _ in validated] == ["0.95", "0.475", "0.3167", "0.1", "0.2", "0.3",
                                                 "0.15", "0.075", "0.05", "0.2", "0.1", "0.06667"]  # fmt: skip


def test_a_run_that_stops_trains_no_more_on_its_page(tmp_path):
    folder = write_start(tmp_path / "demo")
    with run_page.Live(folder, HEADLINES, 60) as live:
        live.update(30, SPARSITY)
    assert "Training: step 30 of 60" in run_page.path(folder).read_text(), "the page of the results follows"
    with pytest.raises(KeyboardInterrupt), run_page.Live(folder, HEADLINES, 60) as live:
        live.update(30, SPARSITY)
        raise KeyboardInterrupt
    text = run_page.path(folder).read_text()
    assert "Not finished." in text and "Training:" not in text and "http-equiv" not in text
    assert "Groups per layer" in titles(text)
    other = write_start(tmp_path / "other")
    with pytest.raises(KeyboardInterrupt), run_page.Live(other, HEADLINES, 60):
        raise KeyboardInterrupt
    assert not run_page.path(other).exists(), "another process than the first, or before the first validation"


def test_pages_become_rarer_if_they_take_long(tmp_path, monkeypatch):
    """A page takes at most 2 % of the time between two of them."""
    now, written = [0.0], []

    def draw(*_):
        written.append(now[0])
        now[0] += 0.5
        return True

    monkeypatch.setattr(run_page, "try_write", draw)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    live = run_page.Live(tmp_path, HEADLINES, 60)
    for _ in range(100):
        now[0] += 4.0  # of an epoch
        live.update(1, SPARSITY)
    assert written[0] == 4.0, "the first epoch has a page"
    assert 0.01 < 0.5 * len(written) / now[0] <= 0.02
    quick = run_page.Live(tmp_path, HEADLINES, 60)
    monkeypatch.setattr(run_page, "try_write", lambda *_: True)
    assert all(quick.update(1, SPARSITY) for _ in range(5)), "a page that takes no time is written at every epoch"


def test_a_failure_to_draw_is_logged_once_and_ends_no_training(tmp_path, monkeypatch, caplog):
    folder = write_start(tmp_path / "demo")

    def fail(*_, **__):
        raise ValueError("no such font")

    monkeypatch.setattr(run_page.plots, "curves", fail)
    monkeypatch.setattr(run_page, "_SHARE", 1e9)  # however long it takes to fail
    live = run_page.Live(folder, HEADLINES, 60)
    assert [live.update(step, SPARSITY) for step in STEPS] == [False] * 3
    warnings = [record.getMessage() for record in caplog.records if "page" in record.getMessage()]
    assert warnings == ["The run's page could not be written (ValueError: no such font)"]
    assert not run_page.path(folder).exists()


def test_a_page_is_replaced_as_a_whole(tmp_path, monkeypatch):
    folder = write_whole(tmp_path / "demo")
    before = run_page.write(folder).read_text()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(web, "document", fail)
    assert not run_page.try_write(folder)
    assert run_page.path(folder).read_text() == before
    assert [path.name for path in run_page.path(folder).parent.iterdir()] == ["index.html"]


def test_names_and_options_cannot_add_html(tmp_path):
    """A folder, an option, an image, a class and a reason that are HTML are shown as text."""
    evil = "<img src=x onerror=alert(1)>"
    folder = write_whole(tmp_path / evil, names=(evil, "</td><script>alert(2)</script>"), classes=(("a", (evil,)),))
    text = run_page.write(folder).read_text()
    assert "<img src=x" not in text and "<script>alert" not in text and "<i>why" not in text and "<b>rug" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") >= 4
    assert text.count("<script>") == 1, "the page's own"


def test_a_run_without_samples_timings_and_training_has_a_page(tmp_path):
    """As an imported one has."""
    folder = write_whole(tmp_path / "demo")
    for name in ("samples.npz", "benchmark.json", "metrics.jsonl", "compact/compact.json"):
        (folder / name).unlink()
    text = run_page.write(folder).read_text()
    assert titles(text) == ["Groups per layer", "Dense and compact"]
    with raises("FILE_MISSING", naming="results.json"):
        run_page.write(tmp_path)


def test_the_report_of_an_unfinished_run_is_its_page(tmp_path, capsys):
    folder = write_start(tmp_path / "demo")
    config = nyu.get_config()
    config.tasks = TASKS
    report.run_job(config, folder)
    assert capsys.readouterr().out.strip() == str(run_page.path(folder))
    assert "Not finished." in run_page.path(folder).read_text()


def test_an_unfinished_run_from_before_targets_and_penalties_has_a_page(tmp_path):
    folder = write_start(tmp_path / "demo")
    values = files.read_json(folder / "config.json")
    del values["sparsity"]["target"], values["sparsity"]["penalty"], values["model"]["backbone"]
    files.write_json(folder / "config.json", values)
    assert "Not finished." in run_page.write(folder, HEADLINES).read_text()


def test_attributes_are_marked_where_they_are_wrong(tmp_path):
    folder = write_whole(tmp_path / "demo")
    records.write_samples(
        folder,
        images=np.zeros((1, 8, 8, 3), np.uint8),
        names=["17"],
        labels={"attribute:Smiling": np.array([1]), "attribute:Male": np.array([0]), "attribute:Hat": np.array([VOID])},
        predictions={"attribute:Smiling": np.array([0.62]), "attribute:Male": np.array([0.9]),
                     "attribute:Hat": np.array([0.1])},
    )  # fmt: skip
    text = run_page.write(folder).read_text()
    assert "<td>Smiling: 62 %<br>✗ Male: 90 %<br>Hat: 10 %</td>" in text


@pytest.mark.parametrize("width", [1, 191, 192, 193, 640])
def test_images_are_made_small(width):
    shown = int(re.search(r'width="(\d+)"', web.image(np.zeros((4, width, 3)), "black", 192))[1])
    assert shown <= 192 and shown >= min(width, 97)
