"""Tests of ``bench.small_tensors``: its table, and the message about missing peers."""

import pandas as pd

from bench import small_tensors

ROWS = pd.DataFrame(
    [
        {"contender": name, "round": number, "seconds": seconds * (1 + number)}
        for name, seconds in {"plain": 0.003, "ReversibleSequential": 0.006}.items()
        for number in range(3)
    ]
)


def test_the_table_relates_each_contender_to_plain_in_the_same_round():
    table = small_tensors.chain_table(ROWS, blocks=4).set_index("contender")
    ours = table.loc["ReversibleSequential"]
    assert ours["/ plain"] == "2.00 [2.00, 2.00]"
    assert ours["ms a step"] == "12.0 [9.0, 15.0]"
    assert ours["us a block above 4/3 of plain"] == "1000 [750, 1250]"  # (12 - 4/3 * 6) ms / 4 in the middle round
    assert list(table.index) == ["plain", "ReversibleSequential"]


def test_the_quick_run_names_peers_that_are_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_tensors, "VENV", tmp_path / "none")
    monkeypatch.setattr(small_tensors, "CONTENDERS", dict.fromkeys(["plain", "ReversibleSequential", "RevTorch"]))
    assert small_tensors.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert "left out: RevTorch: not installed: run python -m bench.peers --install" in out
    assert {"plain", "ReversibleSequential", "revnet38"} <= set(out.split())


def test_without_plain_there_is_nothing_to_compare_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_tensors, "VENV", tmp_path / "none")
    monkeypatch.setattr(small_tensors, "chain_rows", lambda names, **options: ROWS[ROWS.contender != "plain"])
    assert small_tensors.main(["--quick"]) == 1
    assert "plain autograd failed" in capsys.readouterr().err
