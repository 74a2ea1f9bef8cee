"""The snippets, commands, tables and links of the README and of docs/ work as they are written."""

import datetime
import json
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from absl import flags
from ml_collections import config_flags

import mtl_sparse
from configs import sweeps
from input_pipeline import datasets, loader
from mtl_sparse import tasks
from mtl_sparse.compaction import primitives
from mtl_sparse.jobs import cli, train
from mtl_sparse.models import backbones, multitask
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from mtl_sparse.training import step as step_lib
from tests.conftest import copied_repository, new_environment, tiny

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES]
FOLDERS = "mtl_sparse|input_pipeline|configs|colabs|benchmarks|tests|docs"
# Page with Python blocks -> the test that executes all of them.
EXECUTED = {
    "README.md": "tests/readme_test.py::test_the_readmes_snippets_are_those_of_the_tutorial",
    "docs/your_model.md": "tests/readme_test.py::test_the_tutorial",
    "docs/compaction.md": "tests/readme_test.py::test_the_snippets_of_the_compaction_page",
    "docs/groups.md": "tests/readme_test.py::test_the_snippet_of_the_groups_page",
    "docs/weighting.md": "tests/readme_test.py::test_the_snippet_of_the_weighting_page",
    "docs/backbones.md": "tests/readme_test.py::test_a_custom_backbone",
    "docs/extending.md": "tests/readme_test.py::test_a_custom_task",  # and test_a_custom_data_set
    "docs/compact_models.md": "tests/jobs/compact_test.py::test_the_documented_way_to_load_it",
    "docs/export.md": "tests/jobs/export_test.py::test_stablehlo_runs_without_this_package",  # and test_onnx_...,
}
NOT_EXECUTED = {"docs/reference/config.md": "includes configs/nyu.py"}


def blocks(page):
    """Return the Python blocks of a page."""
    return re.findall(r"```(?: \{ )?\.?python(?: \})?\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_every_python_block_is_executed_by_a_test():
    with_blocks = {str(path.relative_to(ROOT)) for path in DOCUMENTS if blocks(path)}
    assert with_blocks == EXECUTED.keys() | NOT_EXECUTED.keys()
    for page, test in EXECUTED.items():
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert f"def {name}(" in text and page.removeprefix("docs/") in text, test


def test_the_readmes_snippets_are_those_of_the_tutorial():
    found = blocks("README.md")
    assert len(found) == 2 and found == blocks("docs/your_model.md")[:2]


@pytest.mark.slow
def test_the_tutorial(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train, compact, timing, plan, save, further, wrap, rules = blocks("docs/your_model.md")
    exec(train, names := {})
    percentage, groups = re.fullmatch(r"(\d+) % of (\d+) groups are zero\n", capsys.readouterr().out).groups()
    assert abs(int(percentage) - 70) <= 6, "each group is about one percent, and rounding moves some"
    assert int(groups) == 3 + 48 + 48
    exec(compact, names)
    before, after = re.match(r"([\d,]+) parameters became ([\d,]+)", capsys.readouterr().out).groups()
    assert int(after.replace(",", "")) < 0.6 * int(before.replace(",", ""))
    assert float(names["difference"]) < 1e-5
    exec(timing, names)
    times = re.match(r"([\d.]+) ms became ([\d.]+) ms .* ([\d.]+) times as fast", capsys.readouterr().out).groups()
    assert float(times[2]) == pytest.approx(float(times[0]) / float(times[1]), rel=0.2)
    exec(plan, names)
    assert "| params/Conv_1/kernel | 48 |" in capsys.readouterr().out
    exec(save, names)
    outputs = names["small_fn"](names["small_params"], names["images"])
    np.testing.assert_array_equal(names["restored_fn"](names["restored"], names["images"]), outputs)
    exec(further, names)
    after = names["small_fn"](names["small_params"], names["images"])
    loss = optax.softmax_cross_entropy_with_integer_labels
    assert loss(after, names["labels"]).mean() < loss(outputs, names["labels"]).mean()
    exec(wrap, names)
    params = {"conv": {"kernel": jax.numpy.ones((3, 3, 4, 8))}, "bn": {"scale": jax.numpy.ones(8)}}
    updates, _ = names["tx"].update(params, names["tx"].init(params), params)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), updates))
    exec(rules, names)
    kernels = {"depthwise": {"kernel": jax.numpy.ones((3, 3, 1, 8))}, "conv": {"kernel": jax.numpy.ones((1, 1, 5, 7))}}
    assert sorted(groups.count for groups in names["penalty"].find(kernels)) == [5, 8]


def test_the_snippets_of_the_compaction_page(capsys, monkeypatch):
    monkeypatch.setattr(primitives, "RULES", dict(primitives.RULES))
    names = {}
    for block in blocks("docs/compaction.md"):
        exec(block, names)
    printed = capsys.readouterr().out
    assert "{'bias': (8,), 'kernel': (3, 3, 3, 8)}" in printed
    page = (DOCS / "compaction.md").read_text()
    (table,) = [block for block in re.findall(r"```text\n(.*?)```", page, re.S) if "became" in block]
    assert table in printed


def test_the_snippet_of_the_groups_page(capsys):
    (block,) = blocks("docs/groups.md")
    exec(block, names := {})
    assert "16 channels, read by " in capsys.readouterr().out
    updates, _ = jax.jit(names["tx"].update)(names["params"], names["tx"].init(names["params"]), names["params"])
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), updates))


def test_the_snippet_of_the_weighting_page():
    (block,) = blocks("docs/weighting.md")
    exec(block, names := {})
    weights, gradients = np.asarray(names["weights"]), np.asarray(names["gradients"])
    np.testing.assert_allclose((gradients @ gradients.T @ weights) * weights, 1, rtol=1e-4)
    np.testing.assert_allclose(names["direction"], weights @ gradients, rtol=1e-5)


def test_a_custom_task(config, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "depth_l1", None)  # removed again at the end
    task, _ = blocks("docs/extending.md")
    exec(task, names := {})
    config.tasks = names["get_config"]().tasks
    run = setup_lib.setup(config)
    state, scalars = step_lib.make_train_step(run)(
        loader.replicate(state_lib.initial(run)), loader.shard(next(run.batches.train(0)))
    )
    assert 0 < float(scalars["depth_l1/loss"]) < 1
    assert state.params["model"]["head_depth_l1"]["out"]["kernel"].shape[-1] == 1
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), state.params))


@pytest.mark.slow
def test_a_custom_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "DATASETS", dict(datasets.DATASETS))
    monkeypatch.chdir(tmp_path)
    _, data_set = blocks("docs/extending.md")
    exec(data_set, names := {})
    config = names["get_config"]()
    config.train.epochs, config.run.summary_rounds = 4, 0
    config.model.update(depth=10, width=8, head_features=8)
    train.train(config, "runs/discs")
    results = json.loads((tmp_path / "runs" / "discs" / "results.json").read_text())
    assert results["frames"] == {"train": 320, "validation": 32, "test": 64}
    assert results["test"]["segmentation/miou"] > results["constant"]["segmentation/miou"] + 0.1
    assert set(results["headlines"]) == {"segmentation", "attribute:Large"}


def test_a_custom_backbone(monkeypatch, rooms):
    monkeypatch.setattr(backbones, "BACKBONES", dict(backbones.BACKBONES))
    (block,) = blocks("docs/backbones.md")
    exec(block, names := {})
    config = tiny(rooms)
    config.model.backbone = names["get_config"]().model.backbone
    run = setup_lib.setup(config)
    assert set(multitask.shapes(run.model)) > {"params/backbone/depthwise/kernel", "params/head_depth/out/kernel"}


def commands(page):
    """Return the lines of a page's shell blocks."""
    return "".join(re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S)).splitlines()


@pytest.mark.slow
def test_a_newcomer_gets_from_a_clone_to_a_compact_and_timed_model(tmp_path):
    """The README's commands and the blocks of README and tutorial, in a new environment; needs a package index."""
    clone = copied_repository(tmp_path / "clone")

    def run(*lines):
        script = "\n".join(["set -e", *lines])
        done = subprocess.run(["bash", "-c", script], cwd=clone, env=new_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    demo = run(commands("README.md")[0])
    assert re.search(r"\| segmentation \| \*\*miou\*\* +\| 0\.[3-9]", demo) and "of groups zero (target 70.0 %)" in demo
    jobs = [line for line in commands("README.md") if "--config=configs/demo.py --job=" in line]
    printed = run(". .venv/bin/activate", *jobs)
    assert len(jobs) == 3 and re.search(r"[\d,]+ parameters became [\d,]+", printed) and "| compact" in printed
    for page in ("README.md", "docs/your_model.md"):
        (clone / "mine.py").write_text("\n".join(blocks(page)))
        printed += run(". .venv/bin/activate", "python mine.py")
    assert len(re.findall(r"\d+ % of 99 groups are zero", printed)) == 2
    dense, small = map(float, re.search(r"([\d.]+) ms became ([\d.]+) ms for 128 images", printed).groups())
    assert small < dense


OPTIONS = [
    line.split(" | ")[1]
    for line in (DOCS / "options.md").read_text().splitlines()
    if line.startswith("|") and "--config." in line
]


def test_the_option_tables_have_rows():
    assert len(OPTIONS) > 20


@pytest.mark.parametrize("name", ["nyu", "demo"])
@pytest.mark.parametrize("row", OPTIONS)
def test_every_option_is_accepted_as_written(row, name, monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    arguments = re.findall(r"--config\S*[^\s`,]", row)
    command = ["launch.py", f"--config={ROOT}/configs/{name}.py", *arguments]
    monkeypatch.setattr(sys, "argv", command)  # config_flags reads overrides from it
    values(command)
    config = values.config
    config.tasks = cli.split_names(config.tasks)
    if "lambda_=1e-4" in row or "penalty" in row:
        assert len(arguments) == 2, "two alternatives, or an option that another config needs as well"
    config_lib.check(config)


def test_every_sweep_has_the_number_of_runs_in_the_table():
    page = (DOCS / "sweeps.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| .*?\((\d+)(?: runs)?\)", page, re.M)
    assert {name for name, _ in listed} == sweeps.SWEEPS.keys()
    counts = {name: int(count) for name, count in listed}
    assert counts.pop("lomt") == 6 * len(sweeps.trials("lomt")), "four single-task and two multi-task runs a seed"
    assert counts == {name: len(sweeps.trials(name)) for name in counts}


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


def test_the_readmes_figures_are_those_of_the_pages():
    """Rows of results in the README are also in the page that they link to, or in the first page."""
    first_page = (DOCS / "index.md").read_text()
    rows = [line for line in README.splitlines() if line.startswith("| ") and re.search(r"\d\.\d{4}", line)]
    assert len(rows) == 3 and all(row in first_page for row in rows)
    for row in re.findall(r"^\| .*\?.* \| .* \| \[\w+\]\(docs/\w+\.md\) \|$", README, re.M):
        _, answer, link = row.strip("| ").split(" | ")
        page = (ROOT / re.search(r"\((.*)\)", link).group(1)).read_text()
        numbers = re.findall(r"[-+]?\d+(?:\.\d+)?", answer.replace("95 %", ""))
        assert numbers and [number for number in numbers if number not in page] == [], row
    assert README.count("](docs/results.md) |") == 1


@pytest.mark.parametrize("page", ["benchmarks.md", "results.md", "tables.md"])
def test_every_table_of_measurements_has_a_date_and_a_machine_above_it(page):
    """The machine may be at the head of the page, or in its first section, which says what was run."""
    head, *sections = re.split(r"(?m)^## ", (DOCS / page).read_text())
    tables = [section for section in sections if "\n| " in section and "| command |" not in section]
    assert len(tables) >= 5 and "two cpu cores" in (head + sections[0]).lower()
    undated = [
        text.partition("\n")[0] for text in tables if not re.search(r"2026-\d\d-\d\d", text.partition("\n| ")[0])
    ]
    assert undated == []


NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]


def test_every_page_is_in_the_nav_once():
    listed = re.findall(r": (\S+\.md)$", NAV, re.M)
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in PAGES)
    assert listed[:2] == ["index.md", "your_model.md"]


def test_the_site_links_to_files_outside_of_docs_on_the_code_host_only():
    text = "[Config](../configs/nyu.py), [a](a.md#b), [gone](../gone.py), [one](https://a.b)\n```\n[x](../launch.py)\n```\n"
    hooks, host = cli.run_file(DOCS / "hooks.py"), "https://host/owner/name"
    assert hooks.rewrite(text, "index.md", host) == text.replace("../configs", f"{host}/blob/main/configs")
    assert hooks.rewrite(text, "index.md") == text.replace("[Config](../configs/nyu.py)", "Config")
    assert "](../CONTRIBUTING.md" in (DOCS / "development.md").read_text(), "there are such links"


def test_the_command_line_page_has_every_job_and_flag():
    page = (DOCS / "reference" / "cli.md").read_text()
    jobs, options = page.split("## Flags")
    assert re.findall(r"^\| `(\w+)` \|", jobs, re.M) == list(cli.JOBS)
    defined = re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", (ROOT / "launch.py").read_text())
    assert sorted(re.findall(r"^\| `--(\w+)` \|", options, re.M)) == sorted(defined) and len(defined) > 10


def test_the_readme_maps_every_page():
    links = set(re.findall(r"\]\((docs/[^)#]+\.md)", README))
    pages = {str(path.relative_to(ROOT)) for path in PAGES}
    assert pages - links == {
        "docs/development.md",  # of contributors: CONTRIBUTING.md
        *(f"docs/reference/{name}.md" for name in ("compaction", "runtime", "sparsity", "tasks", "training")),
    }


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [line for line in README.splitlines() if line.endswith("-m pytest")]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_ci_and_the_hooks_run_the_same_checks():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    *checks, docs = [line for line in lines if line.startswith(".venv/bin/")]
    assert docs == ".venv/bin/python -m pip install -q -e '.[docs]' && .venv/bin/mkdocs build --strict"
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert [check.removesuffix(" .") for check in checks] == [hook.removesuffix(" --force-exclude") for hook in hooks]


def test_the_version_and_its_date_are_the_same_everywhere():
    citation = dict(re.findall(r"(?m)^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text()))
    releases = re.findall(r"(?m)^## (.*), (\S+)$", (ROOT / "CHANGELOG.md").read_text())
    assert releases[0] == (citation["version"], citation["date-released"])
    assert releases[0][0] == mtl_sparse.__version__ and len(releases) > 1
    assert [datetime.date.fromisoformat(date) for _, date in releases], "each release has a date"
    assert "version = attr: mtl_sparse.__version__" in (ROOT / "setup.cfg").read_text()


def anchors(path):
    """Return the anchors of a page's headings, as GitHub and Python-Markdown make them."""
    headings = re.findall(r"(?m)^#+ (.*)", re.sub(r"(?s)```.*?```", "", path.read_text()))
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\]\(.*?\)", "", heading)).strip().lower() for heading in headings]
    return [re.sub(r"\s", "-", heading) for heading in plain]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_linked_file_and_heading_exists(path):
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", path.read_text())
    links = [(link, anchor) for link, anchor in links if not link.startswith("https://")]
    missing = [link for link, _ in links if not (path.parent / link).exists()]
    assert missing == []
    wrong = [
        (link, anchor)
        for link, anchor in links
        if anchor and anchor not in anchors(path.parent / link if link else path)
    ]
    assert wrong == []
    assert path.name != "README.md" or len(links) > 20


def exists(name):
    """Return whether the repository has a file (a/b.py) or folder, or Python finds a name (a.b.c)."""
    if "/" in name:
        return (ROOT / name).exists()
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_named_module_and_file_exists(path):
    text = path.read_text()
    if path.name == "CHANGELOG.md":  # it names former modules in the first column of a table
        text = re.sub(r"(?m)^  \| .*? \| ", "", text)
    name = rf"(?:{FOLDERS})(?:/[\w.]+)*/?|(?:mtl_sparse|input_pipeline)(?:\.\w+)+"
    names = set(re.findall(rf"`({name})(?:\(.*?\))?`", text))
    assert [name for name in sorted(names) if not exists(name)] == []
    assert path.name != "README.md" or len(names) > 10


def test_the_documents_name_tests_that_exist():
    """`faults_test.py::test_a_clock...` needs a function of this beginning, and `::test_...` one in any file."""
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*_test.py")}
    text = "".join(path.read_text() for path in DOCUMENTS)
    named = [pair for pair in re.findall(r"`(\w+_test\.py)?(?:::(\w+))?[.]*`", text) if any(pair)]
    for file, function in named:
        texts = [files[file]] if file else files.values()
        assert any(f"def {function}" in text for text in texts), f"{file}::{function}"
    assert len(named) > 20
