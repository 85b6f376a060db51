"""Every reader refuses a key that stands twice, and names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.store import read_trace as read_exits, write_trace
from helios_sim.profile.importers.layers import read_meta
from helios_sim.profile.store import read_profile, write_profile
from helios_sim.profile.synthetic import flat_profile
from helios_sim.untrusted import Fields, parse_json, parse_yaml
from helios_sim.vary.runner import JOURNAL, Journal
from helios_sim.workload.traces import read_trace


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "'a' stands there twice"),
        ('[{"a": {"b": 1, "b": 2}}]', "'b' stands there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is beyond"),
    ],
)
def test_what_no_json_may_hold(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_json_and_yaml_are_read() -> None:
    assert parse_json('{"a": [1, 2.5, null], "b": {"a": true}}') == {"a": [1, 2.5, None], "b": {"a": True}}
    text = "base: &b {a: 1}\nother:\n  <<: *b\n  c: [1, x]\n"
    assert parse_yaml(text) == {"base": {"a": 1}, "other": {"a": 1, "c": [1, "x"]}}
    with pytest.raises(yaml.YAMLError, match="'a' stands there twice"):
        parse_yaml("b: 1\nx: {a: 1, b: 2, a: 3}\n")


def test_a_name_with_blanks_around_it_is_not_taken_for_a_missing_one() -> None:
    """A number of heads that is not found would be that of another model."""
    values = Fields({"heads": 32, "kv_heads ": 8, " note": "x"}, "config.json", "correct it")
    assert values.integer("heads", 1, 64) == 32
    with pytest.raises(UserError, match=r"kv_heads of config\.json='kv_heads ': this name without blanks around it"):
        values.integer("kv_heads", 1, 64, 32)
    with pytest.raises(ValueError, match="'ttft_s ' has blanks around it"):
        parse_json('[{"a": {"ttft_s ": 1}}]', plain_names=True)
    assert parse_json('{" the": 5}') == {" the": 5}  # a word of a vocabulary
    with pytest.raises(yaml.YAMLError, match="'mode ' has blanks around it"):
        parse_yaml('"mode ": real\n')


@pytest.mark.parametrize("number", ["1e3", "3.35e3", "-5E-2", "2.e+1"])
def test_numbers_with_an_exponent_are_numbers(number: str) -> None:
    assert parse_yaml(f"rate: {number}\nname: a{number}\n") == {"rate": float(number), "name": f"a{number}"}


@pytest.mark.parametrize("number", ["0700", "11:40", "7_00", "0x1F", "1_0.5", "1:30.5", "0b11"])
def test_numbers_that_yaml_alone_reads_are_refused(number: str) -> None:
    with pytest.raises(yaml.YAMLError, match=f"{number} is no plain number"):
        parse_yaml(f"hbm_gb_per_s: {number}\n")


def test_plain_numbers_of_yaml() -> None:
    text = "[0, 7, -7, 0.7, 700.0, 1e3, 1.0e+3, .5, 2026-01-02, '0700', 1.2.3]"
    assert parse_yaml(text)[:5] == [0, 7, -7, 0.7, 700.0]
    assert parse_yaml(text)[6:8] == [1000.0, 0.5]
    assert parse_yaml(text)[9:] == ["0700", "1.2.3"]


def doubled(path: Path, key: str) -> None:
    """Write the object with the key a second time, with another value."""
    text = path.read_text()
    assert f'"{key}"' in text
    path.write_text(text.rstrip()[:-1] + f', "{key}": 7}}\n')


def test_headers(tmp_path: Path) -> None:
    write_profile(flat_profile(0.1), tmp_path / "profile")
    doubled(tmp_path / "profile" / "profile.json", "time_factor")
    with pytest.raises(UserError, match="'time_factor' stands there twice"):
        read_profile(tmp_path / "profile")
    write_trace(synthetic_trace("tiny", tokens=40), tmp_path / "trace")
    doubled(tmp_path / "trace" / "trace.json", "n_tokens")
    with pytest.raises(UserError, match="'n_tokens' stands there twice"):
        read_exits(tmp_path / "trace")
    (tmp_path / "meta.yaml").write_text("measurement_iterations: 3\nmodel: x\nmeasurement_iterations: 1\n")
    with pytest.raises(UserError, match="'measurement_iterations' stands there twice"):
        read_meta(tmp_path)


ROW = '{"arrival_s": 1.0, "prompt_tokens": 5, "output_tokens": 6}'
TWICE = '{"arrival_s": 2.0, "prompt_tokens": 5, "output_tokens": 6, "prompt_tokens": 50}'


@pytest.mark.parametrize(
    ("text", "line"), [(f"{ROW}\n{ROW}\n{TWICE}\n", "line 3"), (f"{TWICE}\n{ROW}\n", ""), (f"[{ROW}, {TWICE}]", "")]
)
def test_request_traces(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"{line}.*'prompt_tokens' stands there twice"):
        read_trace(tmp_path / "trace.jsonl")


def test_a_line_of_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = json.dumps({"key": "a", "sha256": "0"})
    (tmp_path / JOURNAL).write_text(line[:-1] + ', "key": "b"}\n')
    Journal(tmp_path, None)  # type: ignore[arg-type]
    assert "a line is damaged" in capsys.readouterr().err
