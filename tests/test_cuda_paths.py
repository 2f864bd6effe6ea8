"""What the scripts prepare for CUDA, as far as a CPU can show it; tests/test_gpu.py shows the rest."""

import contextlib
import json
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from helpers import make_hf_model, make_tokenizer, read_metrics
from quick_runs import quick_run
from torch import nn

import train_gsm8k_fsdp2
import train_llm
from train_llm import IGNORE

GPU = torch.device("cuda")


# ----------------------------------------------------------------------------------------------------
# 1. Documents by variable-length attention

def test_document_bounds():
    """Starts of documents in the flattened rows, padding as one, the end repeated up to a power of two."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]])
    bounds = train_llm.document_bounds(positions)
    assert bounds.dtype == torch.int32
    # The last row: two tokens, and padding, to which a document of one token in front of it may count.
    assert bounds.tolist() == [0, 3, 5, 6, 8, 12, 12, 12, 12]
    # A document of one token between others stands by itself.
    assert train_llm.document_bounds(torch.tensor([[0, 0, 1, 0, 1]])).tolist() == [0, 1, 3, 5, 5]
    assert train_llm.document_bounds(torch.arange(8)[None]).tolist() == [0, 8]


def test_padding_is_no_position():
    row = {"ids": torch.tensor([5, 6, 7, 9, 1]), "marks": torch.tensor([3, 1, 1, 3, 1])}
    sample = train_llm.unpack(row, Namespace(seq_len=8, packing=True, mask_documents=True))
    assert sample["position_ids"].tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
    assert sample["labels"].tolist() == [6, 7, IGNORE, 1] + [IGNORE] * 4


def varlen_by_loops(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                    enable_gqa=False):
    """torch's varlen_attn, document by document, in plain PyTorch: its kernels are for CUDA alone."""
    out = torch.empty_like(query)
    for start, stop in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:]):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (distance >= 0) & (distance <= (window_size[0] if window_size[0] >= 0 else stop))
        assert window_size[1] == 0 and stop - start <= max_q == max_k
        out[start:stop] = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1)
    return out


@pytest.fixture
def on_loops(monkeypatch):
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_by_loops)


POSITIONS = torch.tensor([[*range(5), *range(7), *range(4)], [*range(9), *range(4), 0, 0, 0]])


def test_own_attention_by_bounds_equals_the_mask(on_loops):
    torch.manual_seed(0)
    config = train_llm.decoder_config(train_llm.MODEL_SIZES["test"])  # 4 heads, 2 key-value heads
    attention = train_llm.Attention(config)
    x = torch.randn(2, 16, config.hidden_size)
    table = train_llm.rotary_table(POSITIONS, config.head_dim, 1e4, torch.float32)
    by_mask = attention(x, table, train_llm.document_mask(POSITIONS), None)
    by_bounds = attention(x, table, None, train_llm.document_bounds(POSITIONS))
    real = torch.ones(2, 16, dtype=torch.bool)
    real[1, 13:] = False
    torch.testing.assert_close(by_bounds[real], by_mask[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3", "mixtral", "phi", "gpt2"])
def test_transformers_attention_by_bounds_equals_each_document_alone(on_loops, tmp_path, family):
    """The names of keyword arguments that reach it, sliding windows and fewer key-value heads included."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    folder = make_hf_model(family, tmp_path / family)
    AttentionInterface.register("varlen", train_llm.varlen_attention)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="varlen")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(model.config.vocab_size, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
    bounds = train_llm.document_bounds(POSITIONS)
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=POSITIONS, cu_seqlens=bounds, use_cache=False).logits
        for row, start, stop in ((0, 0, 5), (0, 5, 12), (0, 12, 16), (1, 0, 9), (1, 9, 13)):
            alone = plain(ids[row:row + 1, start:stop], use_cache=False).logits[0]
            torch.testing.assert_close(found[row, start:stop], alone, rtol=1e-4, atol=1e-5)
        whole = model(input_ids=ids, use_cache=False).logits  # without bounds: a row is a document
        torch.testing.assert_close(whole, plain(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1},
                                     {"attention_mask": torch.ones(1, 1, 4, 4)}], ids=lambda o: next(iter(o)))
def test_what_the_kernel_does_not_have_is_refused(options):
    x = torch.zeros(1, 4, 4, 8)
    with pytest.raises(ValueError, match="no variable-length attention"):
        train_llm.varlen_attention(nn.Module(), x, x, x, options.pop("attention_mask", None), **options)


@pytest.mark.parametrize("dropout, chosen", [(0.0, "varlen"), (0.1, "sdpa")])
def test_dropout_in_attention_is_left_to_masks(on_loops, dropout, chosen):
    """The kernel has none, which a proof without dropout does not meet."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, attn_pdrop=dropout, resid_pdrop=0.0,
                        embd_pdrop=0.0, initializer_range=0.5)
    model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    train_llm.attach_chunked_loss(model)
    with kernels_as_they_were():
        train_llm.prove_packing(model, train_llm.Ranks(0, 0, 1, torch.device("cpu")), can_use_varlen=True)
    assert model.config._attn_implementation == chosen and model.training


# ----------------------------------------------------------------------------------------------------
# 2. Kernels, graphs and shards

def test_rows_of_logits_follow_the_vocabulary():
    class Model:
        config = train_llm.decoder_config(train_llm.MODEL_SIZES["test"])

    for vocab_size, rows in ((32000, 8192), (128256, 2048), (151936, 1536), (1_000_000, 512)):
        Model.config.vocab_size = vocab_size
        assert train_llm.rows_at_once(Model, GPU) == rows
        assert train_llm.rows_at_once(Model, torch.device("cpu")) == 512


def test_local_sampling_leaves_cudnn_out():
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    with train_gsm8k_fsdp2.without_cudnn():
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled


def test_no_row_of_a_mask_is_empty():
    """Two prompts, the first padded by 3 in front: its padding rows looked at nothing."""
    kept = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    mask = train_gsm8k_fsdp2.padded_mask(2, 5, 5, attention_mask=kept, allow_is_causal_skip=False)
    assert mask.shape == (2, 1, 5, 5) and mask.any(-1).all()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.equal(mask[1, 0], causal)
    assert torch.equal(mask[0, 0, 3:], (causal & kept[0])[3:])  # what real tokens see is as it was


@contextlib.contextmanager
def kernels_as_they_were():
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(flags[0])
    torch.backends.cuda.enable_cudnn_sdp(flags[1])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("script, flags", [
    (train_llm, ["--from-scratch", "--tokenizer", "a/b", "--dataset", "a/b"]),
    (train_gsm8k_fsdp2, ["--model", "none/none"])], ids=["llm", "gsm8k"])
def test_one_device_gathers_and_divides_nothing(script, flags, frozen):
    """Resharding there would only cast the weights again, unless they are frozen: then they would stand there
    twice. cuDNN goes with --no-use-flash-attn."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule

    args = script.parse_args([*flags, "--no-use-flash-attn"])
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with kernels_as_they_were():
            model = train_llm.CausalLM(train_llm.decoder_config(train_llm.MODEL_SIZES["test"], 64))
            if frozen:
                model.peft_config = {}  # as LoRA leaves it
            script.shard_model(model, args, init_device_mesh("cpu", (1,)), torch.float32)
            assert not torch.backends.cuda.flash_sdp_enabled()
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        assert len(units) == 3
        for unit in units:
            group = unit._get_fsdp_state()._fsdp_param_group
            assert group.gradient_divide_factor is None
            if unit is not model:
                assert group._reshard_after_forward == frozen
        ids = torch.arange(8)[None]
        loss, _ = model(ids, labels=ids)
        before = model.model.layers[0].mlp.up_proj.weight
        assert hasattr(before, "placements") == frozen  # else whole, still
        loss.backward()
        assert hasattr(model.model.layers[0].mlp.up_proj.weight, "placements")
    finally:
        torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------
# 3. Evaluation takes no gradients, checkpoints can be left out, the same bits again

@pytest.mark.parametrize("grad", [True, False])
def test_the_loss_takes_gradients_only_where_they_are_wanted(grad):
    """Under no_grad `needs_input_grad` is true for parameters: evaluation took the head's gradient."""
    asked, head = [], nn.Linear(8, 32)

    def loss_fn(hidden, weight, bias, labels):
        asked.append(hidden.requires_grad or weight.requires_grad)
        return train_llm.head_loss(hidden, weight, bias, labels)

    hidden = torch.randn(2, 5, 8, requires_grad=True)
    with torch.set_grad_enabled(grad):
        loss, _ = train_llm.chunked_loss(hidden, torch.arange(10).view(2, 5), head, loss_fn, 4)
    assert asked == [grad] * 3 and loss.requires_grad == grad


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    make_tokenizer(folder / "tokenizer", 500)
    rows = [json.dumps({"text": f"{i} pencils and {i * 7} more of them"}) for i in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def flags_for(place, run, *more):
    return ["--from-scratch", "--model-size", "test", "--tokenizer", place / "tokenizer", "--dataset",
            place / "texts.jsonl", "--data-cache", place / "cache", "--seq-len", 32, "--batch-size", 2,
            "--max-steps", 4, "--log-interval", 1, "--device", "cpu", "--no-mixed-precision",
            "--no-export", "--checkpoint-dir", place / run, *more]


def test_checkpoint_interval_0_is_never(place):
    result = quick_run(flags_for(place, "never", "--checkpoint-interval", 0))
    assert not (place / "never/checkpoints").exists()
    assert "checkpoint " not in result.stdout and (place / "never/summary.json").is_file()


def test_deterministic_trains_as_without(place):
    """On a CPU it changes nothing; what it needs of CUDA is set."""
    losses = []
    for name, more in (("plain", []), ("deterministic", ["--deterministic", "--resume", "none"])):
        quick_run(flags_for(place, name, "--checkpoint-interval", 0, *more))
        losses.append([row["train/loss"] for row in read_metrics(place / name)])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_drawing_under_deterministic_algorithms():
    logits, uniform = torch.randn(3, 50), torch.rand(3)
    expected = train_gsm8k_fsdp2.draw_tokens(logits, 1.0, uniform)
    torch.use_deterministic_algorithms(True)
    try:
        found = train_gsm8k_fsdp2.draw_tokens(logits, 1.0, uniform)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, expected, found))
