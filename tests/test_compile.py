"""Compiled blocks: all of them share one graph, with and without recomputation, which stays in force.

aot_autograd traces forward and backward as it does for Inductor; the traced graphs are then run by Python, so
that no compiler is needed. What Inductor makes of them only a GPU shows (tests/test_gpu.py).
"""

import functools

import pytest
import torch
import train_gsm8k_fsdp2
import train_llm
from torch import nn
from torch._dynamo.utils import counters

NUM_BLOCKS, VOCAB = 4, 96
MATMUL = torch.ops.aten.mm.default
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
# What the backward of a block repeats of its forward, in (matrix products, attentions). A block has seven
# layers; nothing in the backward reads the output of the last. Selective keeps attentions and products.
REPEATED = {"none": (0, 0), "full": (6, 1), "selective": (0, 0)}


@pytest.fixture(scope="module")
def mesh():
    """Of a process group of this process alone; FSDP works as it does among many."""
    args = train_llm.parse_args("--from-scratch --tokenizer a/b --dataset a/b --device cpu".split())
    yield train_llm.init_distributed(args, train_llm.Ranks(0, 0, 1, torch.device("cpu")))
    torch.distributed.destroy_process_group()


@pytest.fixture
def graphs(monkeypatch):
    """{"forward": [...], "backward": [...]}: (matrix products, attentions) of each graph of a block."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    found = {"forward": [], "backward": []}

    def note(kind, graph, inputs):
        # A recomputed attention is an argument of operators that keep the random state for it.
        ops = [op for node in graph.graph.nodes for op in (node.target, *node.args[:2])]
        found[kind].append((ops.count(MATMUL), ops.count(ATTENTION)))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=functools.partial(note, "forward"),
                           bw_compiler=functools.partial(note, "backward"),
                           partition_fn=min_cut_rematerialization_partition)
    # The scripts call block.compile(), which asks for Inductor.
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    yield found
    torch._dynamo.reset()


def own_decoder(script):
    config = script.decoder_config((NUM_BLOCKS, 32, 2, 1, 64), VOCAB)
    torch.manual_seed(0)
    return script.CausalLM(config)


def llama(script):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=NUM_BLOCKS, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, use_cache=False))
    (script.attach_chunked_loss if script is train_llm else script.attach_logprobs)(model)
    return model


CASES = [(train_llm, own_decoder), (train_llm, llama), (train_gsm8k_fsdp2, llama)]


def two_steps(script, make, mesh, mode, is_compiled):
    """Loss and gradients, {name: tensor}, of the second of two steps on the same tokens."""
    model = make(script)
    needed = ["--from-scratch", "--tokenizer", "a/b", "--dataset", "a/b"] if script is train_llm else []
    args = script.parse_args([*needed, "--device", "cpu", "--activation-checkpointing", mode,
                              "--compile" if is_compiled else "--no-compile"])
    script.shard_model(model, args, mesh, torch.float32)
    ids = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        if script is train_llm:
            loss, _ = model(ids[:, :-1], labels=ids[:, 1:])
        else:
            rows = torch.arange(32)
            loss = -model(ids[:, :-1], rows, ids[:, 1:].flatten(), 1.0)[0].sum()
        model.zero_grad()
        loss.backward()
    return {"loss": loss.detach()} | {
        name: param.grad.full_tensor() for name, param in model.named_parameters()}


@pytest.mark.parametrize("mode", list(REPEATED))
@pytest.mark.parametrize("script, make", CASES, ids=["own_decoder", "llama", "grpo_llama"])
def test_blocks_share_one_graph_and_recompute(mesh, graphs, script, make, mode):
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = two_steps(script, make, mesh, mode, is_compiled=True)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], dict(counters)
    products, attentions = REPEATED[mode]
    assert graphs == {"forward": [(7, 1)], "backward": [(14 + products, attentions)]}
    expected = two_steps(script, make, mesh, "none", is_compiled=False)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
