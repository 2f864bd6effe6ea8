"""What the device does by itself: matmul and copy speed, attention kernels by mask and length, known faults.

    python benchmarks/gpu_probe.py [--results FILE] [--device cuda] [CHECK...]

matmul     a bf16 product of 8192 x 8192 matrices: the peak that training runs are compared with
copy       within the device, and from pinned host memory
launch     host time of one small kernel
attention  forward and backward of 16,384 tokens in documents, by length, head size and kernel
equal      variable-length attention against a mask that keeps documents apart
masked     whether a row that may look at nothing gives NaN, and whether cuDNN's masked gradient is finite
plans      host time of the first call with a new length, as decoding makes one each token
pinning    whether small buffers on the heap can be pinned, as asynchronous checkpoints do

Each figure is printed and written when it is known; a check that fails is a row with its error. On a CPU the
same runs with tiny sizes, to try this file; figures of that mean nothing.
"""

import argparse
import contextlib
import functools
import inspect
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Row = tuple[str, float | str, str]  # what was measured, its value, the unit
DOCUMENT = 700  # tokens of a document in a packed sequence
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def milliseconds(run: Callable, device: str, calls: int = 10, warm: int = 3) -> float:
    """Median of `calls` single calls, on the device's own clock."""
    times = []
    for number in range(warm + calls):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[warm:])


def host_ms(run: Callable, device: str) -> float:
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begin)


# ------------------------------------------------------------------------------------------------
# Speed

def check_matmul(device: str) -> Iterator[Row]:
    for size in (8192, 4096) if device == "cuda" else (256,):
        a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
        ms = milliseconds(lambda a=a, b=b: a @ b, device, calls=20)
        yield f"matmul {size} bf16", 2 * size**3 / ms / 1e9, "TFLOP/s"


def check_copy(device: str) -> Iterator[Row]:
    nbytes = 4 << 30 if device == "cuda" else 1 << 24
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), device)
    yield "copy within the device, read and written", 2 * nbytes / ms / 1e6, "GB/s"
    if device == "cuda":
        host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        ms = milliseconds(lambda: target[:1 << 30].copy_(host, non_blocking=True), device, calls=5)
        yield "copy from pinned memory", (1 << 30) / ms / 1e6, "GB/s"


def check_launch(device: str) -> Iterator[Row]:
    x, calls = torch.zeros(1, device=device), 2000
    for _ in range(100):
        x.add_(1)
    begin = time.perf_counter()
    for _ in range(calls):
        x.add_(1)
    yield "host time of one small kernel", 1e6 * (time.perf_counter() - begin) / calls, "us"


# ------------------------------------------------------------------------------------------------
# Attention

def make_qkv(device: str, B: int, T: int, heads: int, kv_heads: int, size: int) -> list[Tensor]:
    """q, k, v (B, H, T, size) in bf16, with gradients."""
    torch.manual_seed(0)
    return [torch.randn(B, count, T, size, device=device, dtype=torch.bfloat16, requires_grad=True)
            for count in (heads, kv_heads, kv_heads)]


def document_mask(T: int, device: str, length: int = DOCUMENT) -> Tensor:
    """(T, T) bool: earlier tokens of one's own document."""
    number = torch.arange(T, device=device) // length
    return (number[:, None] == number[None]) & torch.ones(T, T, dtype=torch.bool, device=device).tril()


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def varlen(q: Tensor, k: Tensor, v: Tensor, length: int = DOCUMENT) -> Tensor:
    """The same for documents of `length` tokens, without a mask; (B, H, T, size) in and out."""
    from torch.nn.attention.varlen import varlen_attn
    B, _, T, _ = q.shape
    # torch 2.13 wants to be told of fewer key heads; 2.11 takes them, and knows no such argument.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    ends = [row * T + min(end, T) for row in range(B) for end in range(length, T + length, length)]
    ends = torch.tensor([0, *ends], dtype=torch.int32, device=q.device)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out = varlen_attn(*flat, ends, ends, T, T, window_size=(-1, 0), **grouped)
    return out.unflatten(0, (B, T)).transpose(1, 2)


def forward_backward(attention: Callable, qkv: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    out = attention(*qkv)
    return [out, *torch.autograd.grad(out.float().square().sum(), qkv)]


def forward_backward_ms(attention: Callable, qkv: list[Tensor], device: str) -> float:
    grad = torch.ones_like(qkv[0])

    def run() -> None:
        torch.autograd.grad(attention(*qkv), qkv, grad)

    return milliseconds(run, device, calls=5, warm=2)


def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Keys and values copied for each query head, for a kernel that takes no fewer of them."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attempt_row(name: str, unit: str, measure: Callable) -> Row:
    """A kernel that refuses a shape is a row, too."""
    try:
        return name, measure(), unit
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return name, f"{type(error).__name__}: {first_line(error)}", ""


def check_attention(device: str) -> Iterator[Row]:
    shapes = {"32/8 heads of 64": (32, 8, 64), "24/8 heads of 128": (24, 8, 128)}
    tokens, lengths = (16384, (2048, 4096, 8192)) if device == "cuda" else (128, (64,))
    for shape, sizes in shapes.items():
        for T in lengths:
            qkv = make_qkv(device, tokens // T, T, *sizes)
            mask = document_mask(T, device).repeat(tokens // T, 1, 1, 1)
            variants = {
                "causal, as chosen": (dense, None), "causal, cudnn": (dense, "cudnn"),
                "causal, flash": (dense, "flash"),
                "mask, as chosen": (functools.partial(dense, mask=mask), None),
                "mask, efficient": (functools.partial(repeated, mask=mask), "efficient"),
                "varlen": (varlen, None)}
            for name, (attention, backend) in variants.items():
                with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
                    yield attempt_row(f"attention T {T}, {shape}: {name}", "ms", functools.partial(
                        forward_backward_ms, attention, qkv, device))
    q, k, v = make_qkv(device, 1, 128, 8, 8, 64)
    for name, mask in (("causal", None), ("mask", document_mask(128, device))):
        chosen = torch._fused_sdp_choice(q, k, v, attn_mask=mask, is_causal=mask is None)
        yield f"kernel chosen for {name}", SDPBackend(chosen).name, ""


def check_equal(device: str) -> Iterator[Row]:
    T, length = (2048, 300) if device == "cuda" else (96, 40)
    for name, sizes in {"32/8 heads of 64": (32, 8, 64), "24/8 heads of 128": (24, 8, 128)}.items():
        def measure(sizes=sizes) -> float:
            qkv = make_qkv(device, 2, T, *sizes)
            with sdpa_kernel(SDPBackend.MATH):
                exact = [x.detach().float().requires_grad_() for x in qkv]
                masked = functools.partial(dense, mask=document_mask(T, device, length))
                expected = forward_backward(masked, exact)
            found = forward_backward(functools.partial(varlen, length=length), qkv)
            return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected))

        yield attempt_row(f"varlen in bf16 against a mask in fp32, {name}", "of the largest", measure)


# ------------------------------------------------------------------------------------------------
# Known faults

def count_bad(device: str, mask: Tensor) -> str:
    """How many numbers of output and gradients are not finite under a mask (..., T, T)."""
    qkv = make_qkv(device, 4, mask.shape[-1], 8, 8, 64)
    tensors = forward_backward(functools.partial(dense, mask=mask), qkv)
    found = {name: int((~torch.isfinite(x)).sum()) for name, x in zip(("output", "dq", "dk", "dv"), tensors)}
    return ", ".join(f"{count} in {name}" for name, count in found.items() if count) or "none"


def check_masked(device: str) -> Iterator[Row]:
    """Left padding leaves rows that may look at nothing; a masked length of 64 more than a multiple of 128 is
    where cuDNN's gradients were NaN (pytorch#196678)."""
    padded = torch.ones(4, 1, 64, 64, dtype=torch.bool, device=device).tril()
    padded[..., :10] = False
    for backend in (None, *BACKENDS):
        with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
            yield attempt_row(f"not finite behind 10 padded rows, {backend or 'as chosen'}", "",
                              functools.partial(count_bad, device, padded))
    for T in (64, 192, 320, 256):
        yield attempt_row(f"not finite with a document mask at T {T}, as chosen", "",
                          functools.partial(count_bad, device, document_mask(T, device, 50)))


@torch.no_grad()
def check_plans(device: str) -> Iterator[Row]:
    kernels = {"as chosen": None, "without cudnn": [BACKENDS[name] for name in BACKENDS if name != "cudnn"]}
    for name, backends in kernels.items():
        with sdpa_kernel(backends) if backends else contextlib.nullcontext():
            q, k, v = make_qkv(device, 64, 600, 14, 2, 64)
            step = functools.partial(F.scaled_dot_product_attention, q[:, :, :1], enable_gqa=True)
            host_ms(lambda k=k, v=v, step=step: step(k[:, :, :500], v[:, :, :500]), device)
            times = [host_ms(lambda k=k, v=v, step=step, T=T: step(k[:, :, :T], v[:, :, :T]), device)
                     for T in range(501, 521)]
        yield f"one decoding attention with a new length, {name}", statistics.median(times), "ms"


def check_pinning(device: str) -> Iterator[Row]:
    """Two buffers on one page: the second must not be refused."""
    if device != "cuda":
        yield "pinning", "only with CUDA", ""
        return
    cudart, buffers = torch.cuda.cudart(), [torch.zeros(1300) for _ in range(2)]
    for number, buffer in enumerate(buffers, 1):
        code = cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        yield f"cudaHostRegister of small buffer {number}", str(code), ""
    for buffer in buffers:
        cudart.cudaHostUnregister(buffer.data_ptr())


CHECKS = {"matmul": check_matmul, "copy": check_copy, "launch": check_launch, "equal": check_equal,
          "attention": check_attention, "masked": check_masked, "plans": check_plans,
          "pinning": check_pinning}


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]


def record(results: Path, row: Row) -> None:
    check, value, unit = row
    shown = f"{value:,.4g}" if isinstance(value, float) else value
    print(f"{check:70s} {shown} {unit}", flush=True)
    with results.open("a") as file:
        file.write(json.dumps({"stage": "probe", "check": check, "value": value, "unit": unit}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="if not given, all: " + ", ".join(CHECKS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, default="/dev/null", help="a .jsonl file to add lines to")
    args = parser.parse_args()
    if unknown := set(args.checks) - CHECKS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    if args.device == "cuda":
        subprocess.run(["nvidia-smi"], check=False)
    failed = False
    for name in args.checks or CHECKS:
        try:
            for row in CHECKS[name](args.device):
                record(args.results, row)
        except Exception as error:  # the others still run; a device that is lost fails them all, and is seen
            failed = True
            record(args.results, (name, f"{type(error).__name__}: {first_line(error)}", ""))
    sys.exit(failed)


if __name__ == "__main__":
    main()
