"""examples/train_embedding_fsdp2.py beside sentence-transformers: learning, speed and memory of one process.

    python benchmarks/compare_embedding.py learn --model MINILM --pairs PAIRS --steps 20
    python benchmarks/compare_embedding.py speed --model MINILM --pairs PAIRS --batch-size 128 --rounds 3
    python benchmarks/compare_embedding.py memory --model MINILM --pairs PAIRS --seq-len 32

learn: sentence-transformers' MatryoshkaLoss on the quickstart's pairs, with its learning rate and steps, and
held-out retrieval after it. speed: its cached loss and this project's gradient cache take turns, each in a
fresh process: same weights, batches, chunk, fp32, dropout, AdamW. memory: the largest resident set of both at
batches of 64 and 1,024. Needs sentence-transformers; pairs are those of tools/make_docstring_pairs.py.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import train_embedding_fsdp2 as script  # noqa: E402  (the path comes first)

DIMS = [384, 192, 96, 48]


def read_pairs(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def batch_at(rows: list[dict], step: int, size: int) -> list[dict]:
    """In the order of the script's seed 0."""
    return [rows[script.sample_at(p, len(rows), 0)] for p in range(step * size, (step + 1) * size)]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------------------------------------
# 1. A step of each side: a function of rows

def open_theirs(args: argparse.Namespace, matryoshka: bool, cached: bool):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    torch.manual_seed(0)
    model = SentenceTransformer(str(args.model), device="cpu")
    model.max_seq_length = args.seq_len
    loss_fn = (losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.chunk) if cached
               else losses.MultipleNegativesRankingLoss(model))
    if matryoshka:
        loss_fn = losses.MatryoshkaLoss(model, loss_fn, DIMS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True, weight_decay=0.01)
    model.train()

    def step(rows: list[dict], lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        columns = [[row[key] for row in rows] for key in ("query", "positive")]
        loss = loss_fn([model.preprocess(column) for column in columns], None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, model


def open_ours(args: argparse.Namespace):
    own = script.parse_args([
        "--model", str(args.model), "--dataset", str(args.pairs), "--seq-len", str(args.seq_len), "--device",
        "cpu", "--no-mixed-precision", "--activation-checkpointing", "none", "--grad-cache-chunk",
        str(args.chunk), "--batch-size", str(args.batch_size)])
    ranks = script.read_ranks(own)
    mesh, tokenizer = script.init_distributed(own, ranks), script.load_tokenizer(own)
    model = script.build_model(own)
    optimizer = script.ready_model(own, model, [], torch.float32, mesh, ranks)
    objective = script.read_objective(own)
    count = torch.tensor(float(args.batch_size))

    def step(rows: list[dict], lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        pairs = [script.to_pair(row, "row") for row in rows]
        batch = script.make_batch(pairs, tokenizer, own, ranks.device)
        terms = script.forward_backward(model, batch, objective, own, ranks)
        means, total, norm, _ = script.reduce_stats(model, terms, count, 1, torch.zeros(1))
        script.clip_and_step(optimizer, norm, total, 1.0)
        optimizer.zero_grad()
        return means[0].item()

    return step


# ------------------------------------------------------------------------------------------------
# 2. Measurements

def measure(args: argparse.Namespace) -> None:
    """In a process of its own: prints one line of JSON. The first step is not timed."""
    step = open_ours(args) if args.side == "ours" else open_theirs(args, False, cached=True)[0]
    rows, losses = read_pairs(args.pairs, "train"), []
    tokenizer = script.load_tokenizer(argparse.Namespace(model=str(args.model), trust_remote_code=False))
    for number in range(args.steps + 1):
        if number == (1 if args.steps else 0):
            started, cpu_started = time.perf_counter(), time.process_time()
        losses.append(step(batch_at(rows, number, args.batch_size), args.lr))
    texts = [row[key] for number in range(1, args.steps + 1)
             for row in batch_at(rows, number, args.batch_size) for key in ("query", "positive")]
    tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=args.seq_len)["input_ids"])
                 ) if texts else 0
    print(json.dumps({"side": args.side, "batch": args.batch_size, "losses": losses, "peak_mib": peak_mib(),
                      "tokens_per_s": tokens / (time.perf_counter() - started),
                      "tokens_per_cpu_s": tokens / (time.process_time() - cpu_started)}), flush=True)


def start(args: argparse.Namespace, side: str, batch_size: int, steps: int) -> dict:
    command = [sys.executable, __file__, "measure", "--side", side, "--batch-size", str(batch_size),
               "--steps", str(steps), "--model", str(args.model), "--pairs", str(args.pairs),
               "--seq-len", str(args.seq_len), "--chunk", str(args.chunk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    print(done.stdout.splitlines()[-1], flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def speed(args: argparse.Namespace) -> None:
    found = [start(args, side, args.batch_size, args.steps)
             for _ in range(args.rounds) for side in ("theirs", "ours")]
    for key in ("tokens_per_s", "tokens_per_cpu_s"):
        means = {side: sum(row[key] for row in found if row["side"] == side) / args.rounds
                 for side in ("theirs", "ours")}
        print(f"{key}: theirs {means['theirs']:.0f}, ours {means['ours']:.0f}, "
              f"ratio {means['ours'] / means['theirs']:.2f}")


def memory(args: argparse.Namespace) -> None:
    for side in ("theirs", "ours"):
        small, large = (start(args, side, size, 0)["peak_mib"] for size in (64, 1024))
        print(f"{side}: batch 64 {small:.0f} MiB, batch 1,024 {large:.0f} MiB, {large / small - 1:+.1%}")


def learn(args: argparse.Namespace) -> None:
    step, model = open_theirs(args, True, cached=False)
    rows, started = read_pairs(args.pairs, "train"), time.perf_counter()
    for number in range(args.steps):
        lr = script.learning_rate(number, args.steps, 2, args.lr, args.lr / 10)
        step(batch_at(rows, number, args.batch_size), lr)
    print(f"{args.steps} steps in {time.perf_counter() - started:.0f} s")
    test = read_pairs(args.pairs, "test")
    model.eval()
    q, p = (model.encode([row[key] for row in test], convert_to_tensor=True, batch_size=64)
            for key in ("query", "positive"))
    for d in DIMS:
        vectors = [torch.nn.functional.normalize(x[:, :d], dim=-1) for x in (q, p)]
        rank = script.retrieval_ranks(*vectors, torch.arange(len(test)), torch.arange(len(test)), slice(None))
        near = (rank <= 10).float()
        print(f"dimension {d}: recall@1 {(rank == 1).float().mean():.4f}  recall@10 {near.mean():.4f}  "
              f"mrr@10 {(near / rank).mean():.4f}  ndcg@10 {(near / torch.log2(1.0 + rank)).mean():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["learn", "speed", "memory", "measure"])
    parser.add_argument("--side", choices=["ours", "theirs"], default="ours", help="for measure")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=32, help="texts in a forward, for speed and memory")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-5)
    args = parser.parse_args()
    {"learn": learn, "speed": speed, "memory": memory, "measure": measure}[args.what](args)


if __name__ == "__main__":
    main()
