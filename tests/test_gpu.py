"""What only a CUDA GPU can show: bf16, compile, flash attention, recomputation, asynchronous save, resume."""

import json

import grpo_models
import pytest
import torch
from helpers import REPO, make_hf_model, make_tokenizer, read_metrics, run_script, write_gsm8k_like

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(folder, common arguments of a small model from scratch on the GPU)."""
    folder = tmp_path_factory.mktemp("gpu")
    tokenizer = make_tokenizer(folder / "tokenizer", vocab_size=2000)
    data = write_gsm8k_like(folder / "data.jsonl", 2000)
    return folder, ["--from-scratch", "--model-size", "125M", "--vocab-size", 2048, "--tokenizer", tokenizer,
                    "--dataset", data, "--text-column", "answer", "--seq-len", 512, "--batch-size", 4,
                    "--max-steps", 20, "--log-interval", 1, "--warmup-steps", 2, "--device", "cuda",
                    "--no-export", "--data-cache", folder / "cache"]


def train(place, name, *flags):
    """Losses of the training rows of one run."""
    folder, common = place
    run_script([*common, "--checkpoint-dir", folder / name, *flags], timeout=600)
    return [row["train/loss"] for row in read_metrics(folder / name) if "train/loss" in row]


def test_bf16_follows_fp32(place):
    bf16 = train(place, "bf16", "--no-compile")
    fp32 = train(place, "fp32", "--no-compile", "--no-mixed-precision")
    assert bf16[0] == pytest.approx(fp32[0], rel=2e-3)
    assert bf16[-1] == pytest.approx(fp32[-1], rel=2e-2)
    assert bf16[-1] < 0.8 * bf16[0]


@pytest.mark.parametrize("flags", [
    ["--compile"], ["--compile", "--activation-checkpointing", "selective"],
    ["--no-compile", "--activation-checkpointing", "full"], ["--no-compile", "--no-use-flash-attn"],
    ["--no-compile", "--cpu-offload"], ["--no-compile", "--no-reshard-after-forward"],
], ids=lambda flags: "".join(flags))
def test_option_trains_as_plain_bf16(place, flags):
    plain = train(place, "plain", "--no-compile")
    losses = train(place, "option" + "".join(flags), *flags)
    assert losses[0] == pytest.approx(plain[0], rel=2e-3)
    assert losses[-1] == pytest.approx(plain[-1], rel=2e-2)


def test_resume_from_an_asynchronous_checkpoint_is_bitwise(place):
    folder, common = place
    straight = train(place, "straight", "--checkpoint-interval", 10, "--no-compile", "--keep-checkpoints", 0)
    again = folder / "again" / "checkpoints"
    again.mkdir(parents=True)
    (folder / "straight" / "checkpoints" / "step_000010").rename(again / "step_000010")
    assert train(place, "again", "--no-compile") == straight[10:]


def test_metrics_have_mfu_and_memory(place):
    train(place, "metrics", "--no-compile")
    row = read_metrics(place[0] / "metrics")[-1]
    assert row["perf/peak_mem_gib"] > 0.5
    if "H200" in torch.cuda.get_device_name() or "H100" in torch.cuda.get_device_name():
        assert 0 < row["perf/mfu"] < 1


def test_hf_model_exports_in_bf16(place):
    folder, _ = place
    model = make_hf_model("llama", folder / "llama")
    data = write_gsm8k_like(folder / "chats.jsonl", 200)
    run_script(["--hf-model", model, "--dataset", data, "--seq-len", 128, "--max-steps", 4, "--data-cache",
                folder / "cache", "--checkpoint-dir", folder / "hf", "--device", "cuda"], timeout=600)
    assert json.loads((folder / "hf" / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_stop_signal_saves_and_the_run_goes_on_bitwise(place):
    """The wish to stop is read one step late, from pinned memory, without a wait for the GPU."""
    folder, common = place
    straight = train(place, "unstopped", "--no-compile", "--checkpoint-interval", 100)
    script = folder / "train_llm.py"
    line = '        is_last = progress["step"] == total_steps\n'
    kill = '        progress["step"] == 8 and (os.kill(os.getpid(), signal.SIGUSR1), time.sleep(1))\n'
    source = (REPO / "train_llm.py").read_text()
    assert source.count(line) == 1
    script.write_text(source.replace(line, line + kill))
    stopped = run_script([*common, "--no-compile", "--checkpoint-dir", folder / "stopped"], script=script,
                         check=False, timeout=600)
    assert stopped.returncode == 138 and "stopped (SIGUSR1)" in stopped.stdout
    assert train(place, "stopped", "--no-compile") == straight


@pytest.mark.parametrize("more", [["--no-compile"], ["--compile"], ["--no-compile", "--cpu-offload"]],
                         ids=" ".join)
def test_grpo_samples_as_it_trains(tmp_path, more):
    """bf16 with a key-value cache against bf16 in one forward: the sampler's mismatch stays small."""
    grpo_models.make_policy(tmp_path / "policy")
    grpo_models.make_questions(tmp_path / "questions")
    run_script([*grpo_models.flags(tmp_path, "run", 1), "--device", "cuda", "--mixed-precision", *more,
                "--kl-coef", 0.01], script=REPO / "train_gsm8k_fsdp2.py", timeout=600)
    rows = [row for row in read_metrics(tmp_path / "run") if "train/mismatch_kl" in row]
    assert len(rows) == 6 and all(row["train/mismatch_kl"] < 1e-2 for row in rows)
    assert any(row["train/grad_norm"] > 0 for row in rows)
