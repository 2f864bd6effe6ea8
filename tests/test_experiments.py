"""experiments/: four implementations agree, resume, load each other's checkpoints, and cost what they should.

Equality is exact where the arithmetic is the same. Elsewhere it is 1e-6, relative to the norm of a tensor.
"""

import json
import statistics
import subprocess
import sys

import pytest
import yaml
from helpers import REPO, read_checkpoint, run_script

sys.path.insert(0, str(REPO / "experiments"))
import train_sharding  # noqa: E402  (the path comes first)

IMPLS = ("ddp", "manual", "fsdp1", "fsdp2")
SHARDED = IMPLS[1:]
V, D, L, FF, T = 64, 32, 3, 64, 16
SMALL = ["--vocab-size", V, "--embed-dim", D, "--num-layers", L, "--num-heads", 2, "--ff-hidden-dim", FF,
         "--seq-len", T, "--batch-size", 4, "--warmup-steps", 2, "--lr", 0.01, "--device", "cpu"]
BLOCK_PARAMS = 4 * D + 3 * D * D + D * D + D + 2 * D * FF + FF + D
ROOT_PARAMS = 2 * V * D + T * D + 2 * D


def train(tmp_path, nproc, runs, timeout=300):
    """Run {name: arguments} in one process group; each gets metrics and checkpoints of its name."""
    file = tmp_path / f"runs_{nproc}.json"
    file.write_text(json.dumps([
        [*map(str, [*SMALL, *args]), "--metrics-path", str(tmp_path / f"{name}.jsonl"),
         "--ckpt-dir", str(tmp_path / name)] for name, args in runs.items()
    ]))
    run_script(["--runs", file], nproc=nproc, script="experiments/smoke_test.py", timeout=timeout)


def log_rows(tmp_path, name):
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "log"]


def curve(tmp_path, name):
    """(step, loss, gradient norm) of each step."""
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in log_rows(tmp_path, name)]


def difference(tmp_path, one, other, step):
    """Largest difference of weights and moments of two checkpoints, relative to the tensor's norm."""
    first, second = (read_checkpoint(tmp_path / name / f"step_{step:06d}") for name in (one, other))
    names = [name for name in first if not name.startswith("random.")]
    assert set(names) == {name for name in second if not name.startswith("random.")} and len(names) > 100
    return max(float((first[n] - second[n]).norm() / first[n].norm().clamp(min=1e-12)) for n in names)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process: four implementations with dropout, recomputation and two micro-batches."""
    tmp_path = tmp_path_factory.mktemp("one")
    common = ["--max-steps", 3, "--log-every", 1, "--dropout", 0.1, "--grad-accum", 2,
              "--activation-checkpoint"]
    train(tmp_path, 1, {impl: [*common, "--impl", impl] for impl in IMPLS})
    return tmp_path


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes: 4 steps straight, and 2 from the checkpoint after 2 that `manual` or another wrote."""
    tmp_path = tmp_path_factory.mktemp("two")
    common = ["--max-steps", 4, "--log-every", 1, "--grad-accum", 2, "--dropout", 0.1]
    runs = {impl: [*common, "--save-every", 2, "--impl", impl] for impl in IMPLS}
    for impl in IMPLS:
        resumed = [*common, "--impl", impl, "--resume"]
        runs[f"{impl}_from_itself"] = [*resumed, tmp_path / impl / "step_000002"]
        if impl != "manual":
            runs[f"{impl}_from_manual"] = [*resumed, tmp_path / "manual" / "step_000002"]
            runs[f"manual_from_{impl}"] = [
                *common, "--impl", "manual", "--resume", tmp_path / impl / "step_000002"]
    runs["grad_op"] = [*common, "--impl", "manual", "--sharding", "SHARD_GRAD_OP", "--no-prefetch"]
    runs["fsdp2_grad_op"] = [*common, "--impl", "fsdp2", "--sharding", "SHARD_GRAD_OP"]
    for impl in ("manual", "fsdp2"):
        runs[f"{impl}_bf16"] = [*common, "--impl", impl, "--precision", "bf16"]
    train(tmp_path, 2, runs)
    return tmp_path


# ----------------------------------------------------------------------------------------------------
# 1. The same numbers

@pytest.mark.parametrize("impl", ["manual", "fsdp1", "fsdp2"])
def test_one_process_bitwise(one, impl):
    assert curve(one, impl) == curve(one, "ddp")
    assert difference(one, impl, "ddp", 3) == 0


@pytest.mark.parametrize("impl", ["manual", "fsdp1", "fsdp2"])
def test_two_processes_agree(two, impl):
    for row, expected in zip(curve(two, impl), curve(two, "ddp"), strict=True):
        assert row == pytest.approx(expected, rel=1e-6)
    assert difference(two, impl, "ddp", 4) < 1e-6


def test_resharding_and_prefetch_change_no_number(two):
    assert curve(two, "grad_op") == curve(two, "manual")
    assert difference(two, "grad_op", "manual", 4) == 0


def test_bf16_agrees_with_fsdp2(two):
    assert curve(two, "manual_bf16") == curve(two, "fsdp2_bf16")
    assert difference(two, "manual_bf16", "fsdp2_bf16", 4) == 0


# ----------------------------------------------------------------------------------------------------
# 2. Checkpoints

@pytest.mark.parametrize("impl", IMPLS)
def test_exact_resume(two, impl):
    assert curve(two, f"{impl}_from_itself") == curve(two, impl)[2:]
    assert difference(two, f"{impl}_from_itself", impl, 4) == 0


@pytest.mark.parametrize("impl", ["ddp", "fsdp1", "fsdp2"])
def test_checkpoints_load_in_each_other(two, impl):
    for name in (f"{impl}_from_manual", f"manual_from_{impl}"):
        for row, expected in zip(curve(two, name), curve(two, impl)[2:], strict=True):
            assert row == pytest.approx(expected, rel=1e-6)
        assert difference(two, name, impl, 4) < 1e-6


# ----------------------------------------------------------------------------------------------------
# 3. What it costs

def sent(row):
    return {kind: row[f"comm/{kind}_mib"] * 2**20 for kind in ("all_gather", "reduce_scatter", "all_reduce")}


@pytest.mark.parametrize("impl", ["manual", "fsdp1", "fsdp2"])
def test_bytes_moved_equal_theory(two, impl):
    """Two micro-batches: each gathers a block twice and the root once; then one reduce-scatter of all."""
    for row in log_rows(two, impl):
        bytes_sent = sent(row)
        gathered = 2 * (2 * L * BLOCK_PARAMS + ROOT_PARAMS)
        assert bytes_sent["all_gather"] == pytest.approx(4 * gathered / 2, rel=0.01)
        reduced = L * BLOCK_PARAMS + ROOT_PARAMS
        assert bytes_sent["reduce_scatter"] == pytest.approx(4 * reduced / 2, rel=0.01)


@pytest.mark.parametrize("name, item_size, num_gathers", [
    ("grad_op", 4, 2), ("fsdp2_grad_op", 4, 2), ("manual_bf16", 2, None)])
def test_bytes_without_resharding_and_in_bf16(two, name, item_size, num_gathers):
    params = L * BLOCK_PARAMS + ROOT_PARAMS
    gathered = num_gathers * params if num_gathers else 2 * (2 * L * BLOCK_PARAMS + ROOT_PARAMS)
    bytes_sent = sent(log_rows(two, name)[-1])
    assert bytes_sent["all_gather"] == pytest.approx(item_size * gathered / 2, rel=0.01)
    assert bytes_sent["reduce_scatter"] == pytest.approx(4 * params / 2, rel=0.01)


def test_ddp_sends_all_gradients(two):
    bytes_sent = sent(log_rows(two, "ddp")[-1])
    assert bytes_sent["all_reduce"] == pytest.approx(4 * (L * BLOCK_PARAMS + ROOT_PARAMS), rel=0.01)
    assert bytes_sent["all_gather"] == bytes_sent["reduce_scatter"] == 0


def test_rows_hold_the_documented_metrics(two):
    """experiments/README.md lists each metric, and no other."""
    text = (REPO / "experiments/README.md").read_text().split("| metric | meaning |")[1].split("\n\n")[0]
    listed = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    rows = [json.loads(line) for line in (two / "manual.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["event"] != "start"]
    assert {key for row in rows for key in row} == listed
    assert all(row["time/collectives_s"] > 0 and row["perf/tokens_per_s"] > 0 and row["perf/peak_mem_gib"] > 0
               for row in rows if row["event"] == "log")


# ----------------------------------------------------------------------------------------------------
# 4. Arguments

def test_config_of_the_reference(tmp_path):
    """The layout and the names of the reference's example."""
    file = tmp_path / "demo.yaml"
    file.write_text(yaml.safe_dump({
        "model": {"embed_dim": 768, "num_layers": 6, "num_heads": 12, "ff_hidden_dim": 3072, "dropout": 0.1},
        "runtime": {"mixed_precision": "bf16", "log_every": 5},
        "fsdp": {"sharding_strategy": "SHARD_GRAD_OP", "auto_wrap_policy": "transformer",
                 "activation_checkpointing": True},
        "optim": {"lr": 3.0e-4, "warmup_steps": 200}, "epochs": 2, "batch_size": 3,
    }))
    args = train_sharding.parse_args(["--config", str(file), "--precision", "fp32"])
    assert (args.embed_dim, args.precision, args.sharding, args.lr) == (768, "fp32", "SHARD_GRAD_OP", 3e-4)
    assert args.activation_checkpoint and (args.epochs, args.batch_size, args.dropout) == (2, 3, 0.1)


@pytest.mark.parametrize("entries", [
    {"model": {"lr": 1}}, {"modle": {"embed_dim": 8}}, {"model": {"embed_dim": "x"}}, [1], {"model": [1]}])
def test_config_that_is_wrong(tmp_path, entries, capsys):
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(SystemExit) as raised:
        train_sharding.parse_args(["--config", str(file)])
    assert raised.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("argv, said", [
    (["--impl", "ddp", "--sharding", "FULL_SHARD"], "--impl ddp keeps all weights on each process"),
    (["--impl", "ddp", "--no-prefetch"], "leave --no-prefetch out"),
    (["--impl", "ddp", "--auto-wrap", "size"], "leave --auto-wrap out"),
    (["--impl", "manual", "--use-orig-params"], "one flat shard a unit"),
    (["--impl", "manual", "--no-limit-all-gathers"], "never gathers more than one unit ahead"),
    (["--impl", "fsdp2", "--no-use-orig-params"], "always keeps the model's own parameters"),
    (["--impl", "fsdp1", "--compile", "--no-use-orig-params"], "only with --use-orig-params"),
    (["--embed-dim", "30", "--num-heads", "4"], "not a multiple"),
    (["--resume", "nowhere"], "not a checkpoint"),
    (["--shard-size", "2"], "HYBRID_SHARD"),
    (["--max-steps", "0"], "at least 1"),
])
def test_what_cannot_work_is_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as raised:
        train_sharding.parse_args(argv)
    assert raised.value.code == 2 and said in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# 5. Experiments and their report

def program(name, *args):
    command = [sys.executable, str(REPO / "experiments" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_every_experiment_is_a_config_of_the_script(tmp_path):
    done = program("run_experiments.py", "--output-dir", tmp_path, "--seeds", 2)
    assert done.returncode == 0, done.stderr
    configs = sorted((tmp_path / "configs").iterdir())
    assert len(configs) == 30 and not list(tmp_path.glob("*.log"))
    impls = {train_sharding.parse_args(["--config", str(config)]).impl for config in configs}
    assert impls == set(IMPLS)


def test_report_of_real_runs(two, tmp_path):
    """Three runs that finished, one that did not, and one that has not run at all."""
    (tmp_path / "configs").mkdir()
    sources = {"ddp_fp32_seed0": "ddp", "ddp_fp32_seed1": "ddp", "manual_fp32_seed0": "manual"}
    for run, source in sources.items():
        (tmp_path / f"{run}_metrics.jsonl").write_text((two / f"{source}.jsonl").read_text())
    half = (two / "fsdp2.jsonl").read_text().splitlines(keepends=True)[:3]
    (tmp_path / "fsdp2_fp32_seed0_metrics.jsonl").write_text("".join(half))
    for run in (*sources, "fsdp2_fp32_seed0", "fsdp1_fp32_seed0"):
        (tmp_path / "configs" / f"{run}.json").write_text("{}")
    done = program("analyze_metrics.py", "--experiment-dir", tmp_path, "--baseline", "ddp_fp32")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report/report.md").read_text()
    assert "fsdp2_fp32_seed0: ended after step 2" in text and "fsdp1_fp32_seed0: has not run" in text
    assert "| ddp_fp32 | 2 |" in text and "1.00 ± 0.00" in text and "| manual_fp32 | 1 |" in text
    assert len((tmp_path / "report/summary.csv").read_text().splitlines()) == 3
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("<svg") == 5 and "http" not in page and "<script" not in page
    assert (tmp_path / "report/sharding.png").stat().st_size > 10_000


def test_report_says_what_is_missing(tmp_path):
    done = program("analyze_metrics.py", "--experiment-dir", tmp_path)
    assert done.returncode == 2 and "no configs folder there" in done.stderr
    (tmp_path / "configs").mkdir()
    done = program("analyze_metrics.py", "--experiment-dir", tmp_path)
    assert done.returncode == 2 and "no run has finished" in done.stderr


# ----------------------------------------------------------------------------------------------------
# 6. Long proofs

@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_fifty_steps(tmp_path, nproc):
    common = ["--max-steps", 50, "--log-every", 5]
    train(tmp_path, nproc, {impl: [*common, "--impl", impl] for impl in IMPLS})
    for impl in SHARDED:
        for row, expected in zip(curve(tmp_path, impl), curve(tmp_path, "ddp"), strict=True):
            assert row == (expected if nproc == 1 else pytest.approx(expected, rel=1e-6))
        assert difference(tmp_path, impl, "ddp", 50) <= (0 if nproc == 1 else 1e-6)
    losses = [loss for _, loss, _ in curve(tmp_path, "manual")]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_units_change_no_number(tmp_path):
    common = ["--max-steps", 4, "--log-every", 1, "--impl", "manual"]
    size = ["--auto-wrap", "size", "--min-unit-params", 2000]
    train(tmp_path, 2, {"blocks": common, "none": [*common, "--auto-wrap", "none"], "size": [*common, *size]})
    for name in ("none", "size"):
        assert curve(tmp_path, name) == curve(tmp_path, "blocks")
        assert difference(tmp_path, name, "blocks", 4) == 0


@pytest.mark.slow
def test_memory_scales_as_fsdp2s(tmp_path):
    """The two differ by whole units in flight, and gloo's copies of them: how many depends on timing, but not
    on N. Sixteen blocks, so that they are a small part."""
    args = ["--max-steps", 3, "--log-every", 3, "--embed-dim", 64, "--ff-hidden-dim", 256,
            "--num-layers", 16]
    unit_kib = 4 * 49_792 / 1024
    peaks = {}
    for nproc in (1, 2, 4):
        train(tmp_path, nproc, {f"{impl}_{nproc}": [*args, "--batch-size", 4 // nproc, "--impl", impl]
                                for impl in ("manual", "fsdp2")})
        for impl in ("manual", "fsdp2"):
            peaks[impl, nproc] = log_rows(tmp_path, f"{impl}_{nproc}")[-1]["perf/peak_mem_gib"] * 2**20
    print(f"peak memory, KiB: {peaks}")
    for nproc in (1, 2, 4):
        assert abs(peaks["manual", nproc] - peaks["fsdp2", nproc]) < 6 * unit_kib, peaks
    for impl in ("manual", "fsdp2"):
        assert peaks[impl, 2] < 0.62 * peaks[impl, 1] and peaks[impl, 4] < 0.42 * peaks[impl, 1], peaks


@pytest.mark.slow
def test_four_processes_in_two_groups(tmp_path):
    """HYBRID_SHARD and NO_SHARD train as full sharding does. They sum the gradients of four ranks in another
    order, which Adam magnifies where a gradient is nearly zero: weights are compared less strictly."""
    common = ["--max-steps", 6, "--log-every", 1, "--batch-size", 1]
    hybrid = ["--sharding", "HYBRID_SHARD", "--shard-size", 2]
    runs = {impl: [*common, "--impl", impl, *hybrid] for impl in SHARDED}
    runs |= {f"{impl}_replicated": [*common, "--impl", impl, "--sharding", "NO_SHARD"] for impl in SHARDED}
    train(tmp_path, 4, runs | {"full": [*common, "--impl", "manual"]})
    for name in runs:
        for row, expected in zip(curve(tmp_path, name), curve(tmp_path, "full"), strict=True):
            assert row == pytest.approx(expected, rel=1e-6)
        assert difference(tmp_path, name, "full", 6) < 1e-4


@pytest.mark.slow
def test_manual_is_as_fast_as_fsdp2(tmp_path):
    """Alternating runs on two processes; of each pair the ratio of tokens/s, and of these the median."""
    args = ["--embed-dim", 256, "--ff-hidden-dim", 1024, "--seq-len", 128, "--num-layers", 4,
            "--vocab-size", 512, "--max-steps", 11, "--log-every", 11, "--batch-size", 2]
    order = [(impl, i) for i in range(5) for impl in (("manual", "fsdp2") if i % 2 else ("fsdp2", "manual"))]
    train(tmp_path, 2, {f"{impl}_{i}": [*args, "--impl", impl] for impl, i in order})
    speed = {name: log_rows(tmp_path, "{}_{}".format(*name))[-1]["perf/tokens_per_s"] for name in order}
    ratios = [speed["manual", i] / speed["fsdp2", i] for i in range(5)]
    print(f"tokens/s of manual over fsdp2's, five pairs: {[round(ratio, 2) for ratio in ratios]}")
    assert statistics.median(ratios) >= 0.9, ratios


@pytest.mark.slow
def test_sweep_goes_on(tmp_path):
    """After a failure with the next run, and when it is started again with those that have not finished."""
    tiny = {"model": {"embed_dim": 32, "ff_hidden_dim": 64, "num_layers": 2, "num_heads": 2}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    command = ["run_experiments.py", "--output-dir", tmp_path / "out", "--config", tmp_path / "tiny.yaml",
               "--execute", "--launcher", sys.executable, "--seeds", 1, "--max-steps", 3,
               "--experiments", "ddp_fp32", "manual_fp32"]
    done = program(*command, "--timeout", 0.5)
    assert done.returncode == 1 and done.stdout.count("no end after 0.5 s") == 2, done.stdout + done.stderr
    assert program(*command).returncode == 0
    files = {run: tmp_path / "out" / f"{run}_seed0_metrics.jsonl" for run in ("ddp_fp32", "manual_fp32")}
    kept = files["ddp_fp32"].read_text()
    files["manual_fp32"].write_text(files["manual_fp32"].read_text().splitlines(keepends=True)[0])
    done = program(*command)
    assert done.returncode == 0 and "2 of 2 runs finished" in done.stdout, done.stdout + done.stderr
    assert files["ddp_fp32"].read_text() == kept and '"event": "end"' in files["manual_fp32"].read_text()
