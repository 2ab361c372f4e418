"""The tables of results, runs and memory: which runs count, and the numbers computed from them."""

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reports
from memcnn.models.resnet import MODELS
from memcnn.training.recipe import PUBLISHED, SMOKE, override
from memcnn.training.record import DATASETS, Segment, run_name
from reports import cells
from reports.tables import gpu_measurements, memory_table, published, results_table, runs_table, why_not_full

DESIGN = """
resnet-32  | 92.74, 2:04  | 69.10, 1:58  | 92.86, 1:51 | 69.81, 1:51 | 1.9 238.6
resnet-110 | 93.99, 4:11  | 73.30, 6:44  | 93.55, 2:51 | 72.40, 2:39 | 6.8 810.7
resnet-164 | 94.57, 11:05 | 76.79, 10:59 | 94.80, 4:59 | 76.47, 3:45 | 6.8 2452.8
revnet-38  | 93.14, 2:17  | 71.17, 2:20  | 92.80, 2:09 | 69.90, 2:16 | 2.3 85.6
revnet-110 | 94.02, 6:59  | 74.00, 7:03  | 94.10, 3:42 | 73.30, 3:50 | 7.3 85.7
revnet-164 | 94.56, 13:09 | 76.39, 13:12 | 94.90, 7:21 | 76.90, 7:17 | 7.9 432.7
"""

GENERATED = {"official": False, "checksums": {"generated": "0" * 32}}
SHORT = override(PUBLISHED, iterations=1500)
RENAMED = override(PUBLISHED, learning_rate=0.05)

# Changes that keep a run from being full, and the words that the table must have for each.
BROKEN_OFF = dict(iterations=900, test_iteration=500)
FLAWS = {
    "partial": (dict(status="partial", reason="budget exhausted", **BROKEN_OFF), "partial: budget exhausted"),
    "failed": (dict(status="failed", reason="loss is nan", **BROKEN_OFF), "failed: loss is nan"),
    "running": (dict(status="partial", **BROKEN_OFF), "partial: still running, or killed"),
    "smoke": (dict(recipe=SMOKE, iterations=12, test_iteration=12), "smoke recipe"),
    "shortened": (dict(recipe=SHORT, iterations=1500, test_iteration=1500), "iterations 1500 not 80000"),
    "other rate": (dict(recipe=RENAMED), "learning_rate 0.05 not 0.1"),
    "generated": (dict(data=GENERATED), "generated"),
    "engine off": (dict(engine=False), "engine off"),
}


def tables(*records):
    pairs = [(Path("runs") / run_name(r.model, r.dataset, r.recipe, r.seed), r) for r in records]
    runs = runs_table(pairs)
    return runs, results_table(runs)


def test_the_published_numbers_are_those_of_the_design():
    table = published().set_index(["model", "dataset", "implementation"])
    memory = published().dropna(subset="activations_mib").set_index("model")
    for line in DESIGN.strip().splitlines():
        name, *columns, sizes = [word.strip() for word in line.split("|")]
        model = name.replace("-", "")
        places = [(model, dataset, made) for made in ("TensorFlow", "PyTorch") for dataset in DATASETS]
        for place, column in zip(places, columns, strict=True):
            accuracy, time = column.split(", ")
            hours, minutes = map(int, time.split(":"))
            assert table.loc[place, "accuracy_percent"] == float(accuracy)
            assert table.loc[place, "minutes"] == 60 * hours + minutes
        found = memory.loc[model, ["parameters_mib", "activations_mib"]]
        assert [float(value) for value in found] == [float(size) for size in sizes.split()]
    assert len(table) == 24 + 6
    assert published()["source"].notna().all()


def test_mean_sd_time_and_difference_of_three_runs_are_as_computed_by_hand(full):
    runs = [full(seed=s, test_accuracy=a, train_seconds=t) for s, a, t in ((0, 92, 3000), (1, 93, 3600), (2, 94, 4800))]
    row = tables(*runs)[1].loc["cifar10", "resnet32"]
    assert (row["n"], row["mean_percent"], row["sd_percent"], row["seconds_mean"]) == (3, 93, 1, 3800)
    assert row["difference_points"] == pytest.approx(0.14)
    assert row["low_percent"] == pytest.approx(93 - 4.96828, abs=1e-5)
    assert row["high_percent"] == pytest.approx(93 + 4.96828, abs=1e-5)
    shown = cells.results(tables(*runs)[1], "cifar10").iloc[0]
    assert list(shown["this project"]) == ["93.00 ± 1.00", "3", "1:03:20", "88.03–97.97", "+0.14", "not enough runs"]


def test_three_close_runs_near_the_published_value_reproduce_it(full):
    runs = [full(seed=seed, test_accuracy=value) for seed, value in enumerate((92.7, 92.8, 92.9))]
    assert tables(*runs)[1].loc[("cifar10", "resnet32"), "verdict"] == "reproduced"
    runs = [full(seed=seed, test_accuracy=value) for seed, value in enumerate((91.0, 91.1, 91.2))]
    assert tables(*runs)[1].loc[("cifar10", "resnet32"), "verdict"] == "differs"


def test_one_run_shows_no_spread_and_two_no_interval(full):
    shown = cells.results(tables(full(test_accuracy=92.5))[1], "cifar10").iloc[0]["this project"]
    assert list(shown) == ["92.50", "1", "1:51:00", "—", "−0.36", "not enough runs"]
    shown = cells.results(tables(full(test_accuracy=92), full(seed=1, test_accuracy=93))[1], "cifar10").iloc[0]
    assert list(shown["this project"]) == ["92.50 ± 0.71", "2", "1:51:00", "—", "−0.36", "not enough runs"]


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_run_that_is_not_full_says_why_and_leaves_the_main_table_empty(full, flaw):
    changes, words = FLAWS[flaw]
    runs, results = tables(full(**changes))
    assert words in runs.loc[0, "why"]
    assert not runs.loc[0, "full"]
    assert not results["n"].any()
    others = cells.other_runs(runs)
    assert len(others) == 1 and len(cells.full_runs(runs)) == 0
    assert words in others.iloc[0]["", "why it does not count"]


@st.composite
def drawn_runs(draw):
    """Draw changes of a full run, for up to twelve different folders. Some of the changed runs are still full."""
    made = {}
    for _ in range(draw(st.integers(0, 12))):
        flaws = draw(st.lists(st.sampled_from(sorted(FLAWS)), max_size=2, unique=True))
        changes = dict(
            model=draw(st.sampled_from(["resnet32", "revnet164"])),  # few, so that runs meet in a cell
            dataset=draw(st.sampled_from(DATASETS)),
            seed=draw(st.integers(0, 2)),
            test_accuracy=draw(st.floats(0, 100)),
            train_seconds=draw(st.floats(0, 1e5)),
            commit=draw(st.sampled_from([None, "0" * 40])),
        )
        recipe = PUBLISHED
        for flaw in flaws:
            if not {"status", "recipe"} & FLAWS[flaw][0].keys() & changes.keys():  # at most one of each
                changes |= FLAWS[flaw][0]
                recipe = changes.get("recipe", recipe)
        changes["iterations"] = min(changes.get("iterations", recipe.iterations), recipe.iterations)
        if changes.get("status", "complete") == "complete":
            changes["iterations"] = recipe.iterations
        changes["test_iteration"] = changes["iterations"]
        made[run_name(changes["model"], changes["dataset"], recipe, changes["seed"])] = changes
    return list(made.values())


@given(drawn=drawn_runs())
def test_the_main_table_holds_the_full_runs_and_nothing_else(full, drawn):
    records = [full(**changes) for changes in drawn]
    runs, results = tables(*records)
    assert len(runs) == len(records)
    for dataset in DATASETS:
        shown = cells.results(results, dataset)
        for place, model in enumerate(MODELS):
            here = [r for r in records if (r.model, r.dataset) == (model, dataset) and r.is_comparable]
            row, text = results.loc[dataset, model], shown.iloc[place]["this project"]
            assert row["n"] == len(here)
            if here:
                assert row["mean_percent"] == pytest.approx(sum(r.test_accuracy for r in here) / len(here))
                assert row["seconds_mean"] == pytest.approx(sum(r.train_seconds for r in here) / len(here))
            else:
                assert list(text) == ["—", "0", "—", "—", "—", "not enough runs"]
                numbers = row.drop(["n", "verdict"]).filter(regex="^(?!tensorflow|pytorch)")
                assert numbers.isna().all()


@given(drawn=drawn_runs())
def test_a_run_is_full_exactly_when_nothing_speaks_against_it(full, drawn):
    for changes in drawn:
        record = full(**changes)
        assert record.is_comparable == (not why_not_full(record))


@given(drawn=drawn_runs(), random=st.randoms(use_true_random=False))
def test_the_order_of_the_records_changes_no_table(full, drawn, random):
    records = [full(**changes) for changes in drawn]
    runs, results = tables(*records)
    random.shuffle(records)
    shuffled, again = tables(*records)
    pd.testing.assert_frame_equal(runs, shuffled)
    pd.testing.assert_frame_equal(results, again)
    pd.testing.assert_frame_equal(memory_table(runs), memory_table(shuffled))


def test_a_seed_counts_once_and_the_first_given_counts_whatever_its_accuracy(full):
    worse, better = full(test_accuracy=80.0), full(test_accuracy=95.0)
    for first, second in ((worse, better), (better, worse)):
        runs = runs_table([(Path("records/a"), first), (Path("runs/b"), second)])
        row = results_table(runs).loc["cifar10", "resnet32"]
        assert (row["n"], row["mean_percent"]) == (1, first.test_accuracy)
        assert "seed 0 counts already, from records/a" in list(runs["why"])


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_run_that_does_not_count_takes_no_seed_from_one_that_does(full, flaw):
    runs = runs_table([(Path("records/a"), full(**FLAWS[flaw][0])), (Path("runs/b"), full())])
    assert results_table(runs).loc[("cifar10", "resnet32"), "n"] == 1


def test_the_same_record_in_two_places_is_one_run(full):
    runs = runs_table([(Path("records/a"), full()), (Path("runs/a"), full()), (Path("runs/b"), full(seed=1))])
    assert list(runs["folder"]) == ["records/a", "runs/b"]


def test_runs_on_different_devices_show_their_range_of_times(full):
    gpu = {"type": "cuda", "name": "GPU", "count": 2, "threads": 1}
    on_two = {"device": gpu, "software": {**full().software, "execution": "float32, sync-batch-norm"}}
    runs, results = tables(full(), full(seed=1, train_seconds=1800.0, **on_two), full(seed=2, **on_two))
    assert cells.results(results, "cifar10").iloc[0]["this project", "time"] == "0:30:00–1:51:00"
    assert list(runs["device"]) == ["Some Processor (2 threads)", "2 x GPU", "2 x GPU"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.2, "0:00:00"),
        (59.4, "0:00:59"),
        (59.6, "0:01:00"),
        (242.8, "0:04:03"),
        (599.4, "0:09:59"),
        (599.6, "0:10:00"),
        (3599, "0:59:59"),
        (6660, "1:51:00"),
        (47340, "13:09:00"),
    ],
)
def test_every_duration_reads_as_hours_minutes_and_seconds(seconds, shown):
    assert cells.duration(seconds) == shown


def in_parts(full, *parts, **changes):
    """Return a full run with these parts: (iterations done at its end, execution, runs that shared the device)."""
    gpu, first, segments = {"type": "cuda", "name": "GPU", "count": 1, "threads": 1}, 0, []
    for last, execution, shared_by in parts:
        origin = {"device": gpu, "software": full().software, "commit": None, "clean": None}
        segments.append(
            Segment(first=first, last=last, execution=execution, shared_by=shared_by, train_seconds=1800.0, **origin)
        )
        first = last
    software = {**full().software, "execution": parts[-1][1]}
    seconds = 1800.0 * len(parts)
    return full(
        segments=tuple(segments),
        train_seconds=seconds,
        device=gpu,
        software=software,
        **{"commit": None, "clean": None, **changes},
    )


def test_a_mixed_run_is_marked_and_listed_under_the_other_runs(full):
    pure = in_parts(full, (80_000, "bf16, graph", 1), seed=1)
    parts = (400, "bf16", 1), (600, "bf16", 1), (600, "bf16", 1), (80_000, "float32", 1)  # the third one did nothing
    mixed = in_parts(full, *parts, test_accuracy=99.0)
    runs, results = tables(pure, mixed)
    assert (results.loc[("cifar10", "resnet32"), "n"], mixed.is_comparable) == (1, False)
    (other,) = cells.other_runs(runs).to_dict("records")
    assert other["", "accuracy %"] == "99.00 (mixed execution)"
    why = "mixed execution: bf16 on cuda to iteration 600; float32 on cuda to iteration 80,000"
    assert other["", "why it does not count"] == why
    assert why_not_full(mixed) == [why]
    (counts,) = cells.full_runs(runs).to_dict("records")
    assert (counts["", "accuracy %"], counts["", "execution"]) == ("92.70", "bf16, graph")
    assert list(runs["execution"]) == ["bf16; float32", "bf16, graph"]


def test_the_time_of_a_run_that_shared_its_device_says_so(full):
    alone = in_parts(full, (80_000, "bf16", 1))
    shared = in_parts(full, (500, "bf16", 4), (80_000, "bf16", 2), seed=1)
    partial = in_parts(full, (900, "bf16", 3), seed=2, status="partial", **BROKEN_OFF)
    runs, results = tables(alone, shared, partial)
    assert list(cells.full_runs(runs)["", "time"]) == ["0:30:00", "1:00:00 (shared by 4)"]
    assert list(cells.other_runs(runs)["", "time"]) == ["0:30:00 (shared by 3)"]
    assert cells.results(results, "cifar10").iloc[0]["this project", "time"] == "0:45:00 (shared by 4)"
    assert cells.results(tables(alone)[1], "cifar10").iloc[0]["this project", "time"] == "0:30:00"


def test_memory_is_that_of_a_step_at_batch_100_in_mebibytes(full):
    big, tiny = 2**20 * 240, 2**20 * 30
    smoke = full(recipe=SMOKE, iterations=12, test_iteration=12, activation_bytes=tiny)
    partial = full(seed=1, **FLAWS["partial"][0], activation_bytes=big + 2**20, data=GENERATED)
    plain = full(model="revnet38", engine=False, activation_bytes=big)
    table = memory_table(tables(smoke, partial, plain, full(activation_bytes=big))[0])
    assert list(table.loc["resnet32", ["least_mib", "most_mib", "records"]]) == [240, 241, 2]
    assert table.loc["resnet32", "parameters_mib"] == pytest.approx(1.7811, abs=1e-4)
    assert table.loc["revnet38", ["least_mib", "most_mib", "gpu_devices"]].isna().all()
    shown = cells.memory(table)
    assert list(shown.iloc[0][cells.TENSORS]) == ["1.8", "240.0–241.0", "101 %", "2"]
    assert list(shown.iloc[3][cells.TENSORS]) == ["—", "—", "—", "0"]
    assert list(shown.iloc[0][cells.ON_GPU]) == ["—", "—", "—"]


def on_gpu(execution, name="NVIDIA H200"):
    software = {**FULL_SOFTWARE, "execution": execution}
    return {"device": {"type": "cuda", "name": name, "count": 1, "threads": 16}, "software": software}


FULL_SOFTWARE = {"memcnn": "2.0.0", "python": "3", "torch": "2", "torchvision": "0", "platform": "Linux"}


def measurement_file(folder, *rows, device_type="cuda"):
    """Write a memory.csv of (model, precision, MiB, engine, batch) rows, as a measurement on a GPU does."""
    columns = ["model", "precision", "activation_bytes", "engine", "batch"]
    frame = pd.DataFrame([(m, p, mib * 2**20, e, b) for m, p, mib, e, b in rows], columns=columns)
    folder.mkdir(parents=True)
    frame = frame.assign(device="NVIDIA H100", device_type=device_type, held_bytes=frame["activation_bytes"] - 2**20)
    frame.to_csv(folder / "memory.csv", index=False)


def test_bytes_of_a_gpu_stand_in_columns_of_their_precision_and_never_among_those_of_tensors(full):
    runs, _ = tables(
        full(activation_bytes=2**20 * 240),
        full(seed=1, activation_bytes=2**20 * 121, **on_gpu("bf16, graph, compile")),
        full(seed=2, activation_bytes=2**20 * 244, **on_gpu("tf32")),
        full(seed=3, activation_bytes=2**20 * 130, device=full().device, software=on_gpu("bf16")["software"]),
    )
    table = memory_table(runs)
    assert list(table.loc["resnet32", ["least_mib", "most_mib", "records"]]) == [240, 240, 1]
    shown = cells.memory(table)
    assert list(shown.iloc[0][cells.ON_GPU]) == ["244.0", "121.0", "NVIDIA H200"]
    assert list(shown.iloc[1][cells.ON_GPU]) == ["—", "—", "—"]


def test_a_measurement_file_of_a_gpu_fills_the_columns_and_that_of_a_cpu_does_not(full, tmp_path):
    rows = [("resnet32", "bf16", 122, True, 100), ("revnet38", "float32", 104, True, 100)]
    left_out = [("revnet38", "bf16", 300, False, 100), ("resnet110", "bf16", 5, True, 8)]
    measurement_file(tmp_path / "nvidia-h100", *rows, *left_out)
    measurement_file(tmp_path / "cpu", ("resnet164", "float32", 7, True, 100), device_type="cpu")
    measured, problems = gpu_measurements(tmp_path)
    assert problems == []
    runs, _ = tables(full(activation_bytes=2**20 * 121, **on_gpu("bf16")))
    shown = cells.memory(memory_table(runs, measured))[cells.ON_GPU]
    assert list(shown.iloc[0]) == ["—", "121.0–122.0", "NVIDIA H100; NVIDIA H200"]
    assert list(shown.iloc[3]) == ["104.0", "—", "NVIDIA H100"]
    assert all(list(shown.iloc[place]) == ["—", "—", "—"] for place in (1, 2, 4, 5))
    assert list(cells.memory(memory_table(tables()[0], measured))[cells.ON_GPU].iloc[0])[1] == "122.0"


HEAD = "model,precision,activation_bytes,held_bytes,device,device_type,batch,engine\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "No columns"),
        ("model\nresnet32\n", "missing columns activation_bytes"),
        (HEAD + "vgg,bf16,1,1,x,cuda,100,True\n", "vgg"),
        (HEAD + "resnet32,bf16,0,1,x,cuda,100,True\n", "above 0"),
        (HEAD + "resnet32,bf16,1,a,x,cuda,100,True\n", "above 0"),
    ],
)
def test_a_bad_measurement_file_is_named_with_its_reason(tmp_path, content, reason):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "memory.csv").write_text(content)
    measured, [problem] = gpu_measurements(tmp_path)
    assert measured.empty and problem.startswith(str(tmp_path / "gpu" / "memory.csv")) and reason in problem


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_the_committed_full_runs_of_resnet32_reproduce_their_cells_as_their_curves_say(dataset):
    row = reports.build(reports.RECORDS, reports.RECORDS).results.loc[dataset, "resnet32"]
    folders = [reports.RECORDS / f"resnet32-{dataset}-published-s{seed}" for seed in range(3)]
    ends = pd.DataFrame([pd.read_csv(folder / "curve.csv").iloc[-1] for folder in folders])
    assert (ends["iteration"] == 80_000).all()
    assert (row["n"], row["verdict"]) == (3, "reproduced")
    assert row["mean_percent"] == pytest.approx(ends["test_accuracy"].mean(), abs=1e-9)
    assert row["seconds_mean"] == pytest.approx(ends["train_seconds"].mean(), abs=1e-9)
