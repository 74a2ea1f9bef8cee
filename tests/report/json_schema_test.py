"""docs/schemas follows from the dataclasses, and accepts what they write and nothing else."""

import dataclasses
import json
import pathlib

import jsonschema
import pytest

from mtl_sparse.report import json_schema, schema

DOCS = pathlib.Path(__file__).parents[2] / "docs"
BY_KIND = {cls.kind: cls for cls in json_schema.KINDS}
ROW = schema.TimingRow("model", "dense", 1, 2, 3, 1.5, 2.0, 1.0, 9.0, 0.5, 4.0)
WRITTEN = {
    "benchmark": schema.Timing("cpu", (32, 48), 3, {}, group_sparsity=0.5, rows=(ROW,)).to_json(),
    "latency": schema.Latency("cpu", (32, 48), 3, "input", (schema.PatternTiming("even", 1, 0.5, 2.0, 0.6),)).to_json(),
    "sweep": schema.Sweep({"seed=0": {"seed": 0}}).to_json(),
    "lomt": schema.Choices(
        18, 0.1, 1.0, {"depth": schema.Choice("stem", "stem", ("stem",), {"stem": (0.5,)}, ("a",))}
    ).to_json(),
    "compact": [schema.CompactLayer("stem", 3, 1, 2, 0, 27, 18, 10, 5, "").to_json()],
    "results": schema.Results.read(DOCS / "results/evidence/lambda_=0.0,seed=0/results.json").to_json(),
}


def check(kind, value):
    jsonschema.validate(json.loads(json.dumps(value)), json.loads((DOCS / "schemas" / f"{kind}.json").read_text()))


def test_the_files_are_those_of_the_code(tmp_path):
    json_schema.write(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        path.name: path.read_text() for path in (DOCS / "schemas").iterdir()
    }


def test_every_kind_of_file_has_a_schema():
    kinds = {
        one.kind
        for one in vars(schema).values()
        if isinstance(one, type) and issubclass(one, schema.Schema) and one.kind
    }
    assert kinds == BY_KIND.keys() == WRITTEN.keys()


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_written_is_valid(kind):
    check(kind, WRITTEN[kind])


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_missing_key_and_another_type_are_not(kind):
    value = WRITTEN[kind][0] if kind == "compact" else WRITTEN[kind]
    written = (lambda one: [one]) if kind == "compact" else (lambda one: one)
    for key in value:
        if key in {field.name.rstrip("_") for field in dataclasses.fields(BY_KIND[kind]) if "None" in str(field.type)}:
            continue
        with pytest.raises(jsonschema.ValidationError):
            check(kind, written({name: part for name, part in value.items() if name != key}))
        with pytest.raises(jsonschema.ValidationError):
            check(kind, written(value | {key: None}))


def test_attributes_are_described():
    for cls in json_schema.KINDS:
        for name, one in json_schema.of(cls).get("properties", {}).items():
            assert name in ("version", "trials") or one["description"].strip(), f"{cls.__name__}.{name}"
