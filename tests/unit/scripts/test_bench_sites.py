"""The benchmark of sites: its arithmetic by hand, and a run of all of it with small messages."""

from __future__ import annotations

import json

import pytest

from scripts.bench.sites.__main__ import CASES_BY_NAME, main
from scripts.bench.sites.many import Crowd, forecast, growth


def crowd(sites, processor):
    return Crowd(sites, 1.0, 1.0, processor, 0.0, anonymous=2_000_000 * sites + 5_000_000, cache=0, threads=9)


def test_growth_is_the_line_through_all_but_the_most_sites():
    line = growth([crowd(sites, 0.1 + 0.02 * sites) for sites in (4, 8, 16)] + [crowd(32, 2 * (0.1 + 0.02 * 32))])
    assert line.fixed == pytest.approx(0.1)
    assert line.per_site == pytest.approx(0.02)
    assert line.bytes_per_site == pytest.approx(2e6)
    assert line.bend == pytest.approx(2.0)


def test_a_forecast_adds_up_by_hand():
    line = growth([crowd(sites, 0.1 + 0.02 * sites) for sites in (4, 8, 16)])
    found = forecast(line, sites=500, size=4_000_000, rate=1e9, cores=2, copies=3.0)
    assert found.link == pytest.approx(500 * 4e6 * 8 / 1e9) == pytest.approx(16.0)
    assert found.processor == pytest.approx(0.1 + 0.02 * 500 / 2)
    assert found.memory == pytest.approx(3 * 4e6 + 500 * 2e6)
    assert found.threads == 2004
    many = forecast(line, sites=500, size=4_000_000, rate=1e9, cores=64, copies=3.0)
    assert many.processor == pytest.approx(0.1 + 0.02 * 500 * 0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["ring"], "unknown: ring; valid: link, combination, many"), ([], "link, combination, many, or say --all")],
)
def test_cases_that_are_none_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_quick_run_fills_all_tables(tmp_path, capsys):
    main(["--all", "--quick", "--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1,001,")]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"machine", "load", *CASES_BY_NAME}
    assert figures["combination"]["combination"]["ratio"] > 0
    assert [crowd["sites"] for crowd in figures["many"]["crowds"]] == [1, 2, 3]
    assert all(0 < use["goodput"] < 1 for use in figures["link"])
