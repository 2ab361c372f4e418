"""The benches of budgets, volumes and peers of the reference networks, and the page that is made from them."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from bench import budget, grids, network_laws, networks_page, reference_peers, volumes
from bench.cases import THREE
from bench.reference import MAKERS
from memcnn import AdditiveCoupling, ReversibleSequential
from properties.support import commands

GIB = 2**30


def fails(*_):
    raise RuntimeError("is not available")


def test_a_contender_that_fails_leaves_the_measurements_of_the_others():
    def chain():
        return ReversibleSequential(AdditiveCoupling(nn.Conv2d(2, 2, 1)))

    makers = [("plain autograd", chain), ("broken", fails), ("other", chain)]
    table, failures = budget.measure(makers, torch.randn(1, 4, 2, 2), rounds=2)
    assert list(table["chain"]) == ["plain autograd", "other"]
    assert failures == [("broken", "RuntimeError: is not available")]
    assert table["tensors, bytes"].nunique() == 1 and (table["tensors, bytes"] > 0).all()


def test_a_plan_estimates_more_time_for_a_wide_convolution_than_for_elementwise_functions():
    rows = budget.prices(torch.randn(1, 32, 8, 8), rounds=3).set_index("branches")
    assert set(rows.index) == set(budget.BRANCHES) and (rows["measured ns / byte"] > 0).all()
    cost = rows["estimated cost / byte"]
    assert cost["convolution 7"] == cost.max() and cost["four times tanh"] < cost["tanh"]
    assert len(budget.prices_table(rows.reset_index())) == len(budget.BRANCHES)


def test_blocks_of_unequal_cost_are_planned_by_their_price():
    x = torch.randn(1, 32, 8, 8)
    makers = dict(budget.eager(6, x, budget.unequal, (0.3,)))
    chain = makers[next(name for name in makers if name.startswith("budget_bytes="))]()
    chain(x.requires_grad_()).sum().backward()
    (plan,) = chain.budget.plans.values()
    assert {0, 3} <= plan.stored < set(range(6)), "the convolutions of width 7 come first"


def test_a_peer_that_fails_leaves_the_rows_of_the_others(monkeypatch):
    def linear(depth: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))

    def doubled(depth: int) -> nn.Module:
        module = linear(depth)
        module[-1].register_full_backward_hook(lambda module, given, out: (2 * given[0],))
        return module

    makers = {"plain autograd": linear, "same": linear, "wrong": doubled, "broken": fails}
    contenders = {name: reference_peers.Contender(make) for name, make in makers.items()}
    monkeypatch.setitem(reference_peers.PAIRS, "glow", lambda: (contenders, torch.randn(3, 2)))
    rows, failures = reference_peers.compare("glow", rounds=2)
    errors = {row["contender"]: row["worst error"] for row in rows}
    assert list(errors) == ["plain autograd", "same", "wrong"] and failures[0][0] == "glow, broken"
    assert errors["same"] < 1e-5 < 0.1 < errors["wrong"]
    assert "is not available" in failures[0][1] and all("[" in row["time / plain"] for row in rows)
    assert list(reference_peers.table(pd.DataFrame(rows))["parameters"]) == ["96"] * 3


def test_a_pair_whose_package_is_missing_is_named(monkeypatch, tmp_path, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'peer'")

    monkeypatch.setitem(reference_peers.PAIRS, "glow", missing)
    assert reference_peers.main([str(tmp_path), "--only", "glow"]) == 1
    assert f"left out: glow: No module named 'peer'; install it into {tmp_path}" in capsys.readouterr().out


def test_the_largest_volume_is_the_last_that_fits(monkeypatch):
    bytes_of_a_voxel = {"plain": 4000, "checkpoint": 2000, "reversible": 500}
    monkeypatch.setattr(volumes, "peak_bytes", lambda subject, blocks, side: bytes_of_a_voxel[subject] * side**3)
    rows = volumes.largest(10, 2, [2])
    for row in rows.to_dict("records"):
        each = bytes_of_a_voxel[row["activations"]]
        assert each * row["largest side"] ** 3 <= 8 * GIB < each * (row["largest side"] + 4) ** 3
        assert row["peak bytes of the next side"] > 8 * GIB >= row["peak bytes"]
    assert volumes.table(rows)["voxels / plain"].iloc[0] == "1.0"


def test_inversion_is_exact_on_a_grid_and_relus_error_shrinks_more_slowly_than_gelus(monkeypatch):
    monkeypatch.setattr(grids, "DEPTH", 4)
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = grids.compare(x, (6, 10, 14))
    on_grid, without = rows[:3], rows[3:]
    assert list(on_grid["inversion"]) == [0, 0, 0] and list(on_grid["largest value"]) == [2**18, 2**14, 2**10]
    smooth = list(on_grid["norm, GELU"])
    assert smooth[0] > 8 * smooth[1] > 64 * smooth[2] and on_grid["norm"].iloc[-1] > smooth[-1]
    assert without["norm"].iloc[0] < 1e-5 < without["norm"].iloc[1]
    assert list(grids.table(rows)["error of inversion"]) == ["0"] * 3 + [""] * 2


def test_the_predicted_peak_falls_from_plain_to_checkpoint_to_reversible():
    sizes = [volumes.peak_bytes(subject, 1, 32) for subject in THREE]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_the_page_is_what_the_measurements_say():
    page = networks_page.PAGE.read_text()
    for name, (file, make) in networks_page.TABLES.items():
        if not (rows := networks_page.measured(file)).empty:
            assert networks_page.with_table(page, name, make(rows)) == page, (
                f"run python -m bench.networks_page: {name}"
            )
    assert set(networks_page.NETWORKS) == set(MAKERS)


def test_readme_names_every_network_with_its_measured_bytes_and_paper():
    rows, readme = networks_page.measured("memory.csv"), networks_page.README.read_text()
    table = networks_page.in_readme(rows)
    assert networks_page.with_table(readme, "networks", table) == readme, "run python -m bench.networks_page"
    at_32 = rows[rows["depth"] == 32].set_index("network")
    for network, (title, file, _, number) in networks_page.NETWORKS.items():
        if not network.endswith("-exact"):
            (shown,) = (row for row in table.to_dict("records") if row["network"].startswith(f"[{title}]"))
            assert file in shown["network"] and number in shown["paper"]
            assert shown["parameters"] == f"{at_32['parameters'][network]:,}"
            assert float(shown["peak, MiB"]) == pytest.approx(at_32["reversible"][network] / 2**20, rel=0.005)
            assert float(shown["stored, MiB"]) == pytest.approx(at_32["plain"][network] / 2**20, rel=0.005)


def test_every_network_is_measured_at_three_depths_beside_plain_and_checkpoint():
    rows = networks_page.measured("memory.csv")
    assert set(zip(rows["network"], rows["depth"], strict=True)) == {(n, d) for n in MAKERS for d in (8, 32, 128)}
    for _, one in rows.groupby("network"):
        assert one["plain"].is_monotonic_increasing and one["checkpoint"].is_monotonic_increasing
        assert one["reversible"].max() - one["reversible"].min() <= 16 * (128 - 8), "16 bytes a block in exact mode"


def test_a_table_needs_its_marks():
    table = pd.DataFrame({"a": ["x"]})
    page = networks_page.with_table("before\n<!-- a -->\nold\n<!-- end -->\nafter", "a", table)
    assert "old" not in page and page.startswith("before") and page.endswith("after") and "| x" in page
    with pytest.raises(ValueError, match="the marks of the table 'b' 0 times; wanted once"):
        networks_page.with_table(page, "b", table)


def test_a_table_that_was_not_measured_stays_and_is_named(monkeypatch, tmp_path, capsys):
    marks = "".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in networks_page.TABLES)
    (tmp_path / "page.md").write_text(marks)
    rows = [
        {"network": "ode", "depth": d, "parameters": 5, "plain": d, "checkpoint": 2, "reversible": 1} for d in (8, 32)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "memory.csv", index=False)
    (tmp_path / "readme.md").write_text("<!-- networks -->\nold\n<!-- end -->")
    for name, file in (("DATA", ""), ("PAGE", "page.md"), ("FIGURE", "figure.svg"), ("README", "readme.md")):
        monkeypatch.setattr(networks_page, name, tmp_path / file)
    assert networks_page.main([]) == 1
    page = (tmp_path / "page.md").read_text()
    assert "ODE block" in page and "<!-- volumes -->\nold" in page
    assert "the table volumes stays as it is" in capsys.readouterr().err
    assert "ODE block" in (tmp_path / "readme.md").read_text()
    assert "ODE block" in (tmp_path / "figure.svg").read_text() or (tmp_path / "figure.svg").stat().st_size > 5000


def test_every_network_meets_its_laws_at_realistic_sizes():
    rows = networks_page.measured("laws.csv")
    assert set(rows["target"]) == set(vars(network_laws.targets))
    assert not (rows["verdict"] == "FAIL").any() and (rows["error"] <= rows["limit"]).all()
    for name in set(rows["target"]):
        target = getattr(network_laws.targets, name)
        of_target = rows[rows["target"] == name]
        assert list(of_target["law"]) == list(target.laws) and set(of_target["input"]) == {target.shape}


def test_the_worst_result_is_the_one_nearest_to_its_limit_and_a_failure_before_all():
    def result(claim, error, limit, verdict="PASS"):
        return {"claim": claim, "error": error, "limit": limit, "verdict": verdict, "skipped": "why"}

    passed = [result("a", 1e-6, 1e-3), result("b", 1e-12, 1e-10), result("c", 0.0, 0.0)]
    assert network_laws.worst(passed)["claim"] == "b"
    assert network_laws.worst([*passed, result("d", 2.0, 1.9, "FAIL")])["claim"] == "d"
    assert network_laws.worst([*passed, result("e", 0, 0, "SKIP")])["skipped"] == 1
    assert network_laws.worst([result("e", 0, 0, "SKIP")])["claim"] == "why"


def test_a_target_is_verified_by_the_command_and_its_table_has_each_law(monkeypatch):
    small = replace(network_laws.targets.ode, blocks=1, shape="2,4", laws=("state",))
    monkeypatch.setattr(network_laws, "targets", SimpleNamespace(ode=small))
    words = network_laws.command("ode", "out.json")
    assert words[0] == "bench.network_laws:targets.ode.module" and "state" in words and "--chain" not in words
    monkeypatch.setattr(network_laws.subprocess, "run", lambda words, **_: commands.run(*words[1:]))  # starts faster
    (row,) = network_laws.verified("ode")
    assert row["verdict"] == "PASS" and row["claims"] > 3
    (line,) = network_laws.table(pd.DataFrame([row])).to_dict("records")
    assert line["state"] == "0" and line["memory"] == "" and "2 x 4" in line["part"]
