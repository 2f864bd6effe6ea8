"""Which families of transformers train right: a small random model of each through both commands, as a table.

    python tests/sweep_families.py FOLDER [FAMILY...]

In fp32, one process, one step. loss: first loss within 1e-5 and gradients within 1e-4 of transformers';
packing: so also with several documents in a sample, each compared by itself; export: the names on disk are
the source's, and logits equal (the command itself compares them); rollouts: logprobs of local ones within
1e-4. An entry says "refused" where the command ended with one clear line, and in brackets what else went
wrong. About seven seconds a family. PhiMoE's routers draw experts at random in training: its loss is another
each time.
"""

import argparse
from pathlib import Path

from family_kinds import (
    EXPERTS, FULL, GATED, KINDS, LENGTHS, SIZES, VOCAB, check_against, check_rollouts, documents_of,
    make_model, open_driver, pieces, refusal, reinforce_once, train_once,
)
from helpers import HF_FAMILIES
from safetensors import safe_open

HEADS = dict(SIZES, num_attention_heads=4)
PLAIN = dict(vocab_size=VOCAB, hidden_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=None)
OLD = dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0,
           attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
HYBRID = ["linear_attention", "full_attention"]
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
              linear_value_head_dim=16, layer_types=HYBRID)
DBRX = dict(vocab_size=VOCAB, d_model=64, n_heads=4, n_layers=2, max_seq_len=256, bos_token_id=0,
            eos_token_id=0)
NO_DROPOUT = dict(attention_dropout=0.0, hidden_dropout=0.0)
FOUR = dict(num_local_experts=4, num_experts_per_tok=2)
MLA = dict(q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
SLIDES = ["sliding_attention", "full_attention"]

# Beside those of KINDS and HF_FAMILIES: (configuration class of transformers, its arguments).
MORE = {
    "olmo": ("OlmoConfig", GATED), "olmo2": ("Olmo2Config", GATED),
    "olmo3": ("Olmo3Config", dict(GATED, sliding_window=16, layer_types=SLIDES)),
    "granite": ("GraniteConfig", dict(GATED, logits_scaling=2.0)),
    "granitemoe": ("GraniteMoeConfig", dict(GATED, **FOUR)),
    "granitemoehybrid": ("GraniteMoeHybridConfig", dict(
        GATED, **FOUR, shared_intermediate_size=64, layer_types=["mamba", "attention"], mamba_n_heads=8,
        mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16)),
    "stablelm": ("StableLmConfig", GATED),
    "gemma": ("GemmaConfig", dict(GATED, head_dim=16)),
    "gemma2": ("Gemma2Config", dict(
        GATED, head_dim=16, query_pre_attn_scalar=16, sliding_window=16, final_logit_softcapping=2.0)),
    "gemma3n_text": ("Gemma3nTextConfig", dict(
        GATED, head_dim=16, sliding_window=16, layer_types=SLIDES, num_kv_shared_layers=0, laurel_rank=8,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCAB, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0])),
    "gemma4_text": ("Gemma4TextConfig", dict(
        GATED, head_dim=16, global_head_dim=16, sliding_window=16, layer_types=SLIDES,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=0)),
    "cohere": ("CohereConfig", GATED),
    "cohere2": ("Cohere2Config", dict(GATED, sliding_window=16, layer_types=SLIDES)),
    "phi3": ("Phi3Config", dict(GATED, resid_pdrop=0.0, embd_pdrop=0.0)),
    "phimoe": ("PhimoeConfig", dict(GATED, **FOUR)),
    "qwen2_moe": ("Qwen2MoeConfig", dict(
        GATED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32)),
    "qwen3_5_text": ("Qwen3_5TextConfig", dict(GATED, **LINEAR, head_dim=16)),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", dict(
        EXPERTS, **LINEAR, num_experts=4, shared_expert_intermediate_size=32)),
    "deepseek_v2": ("DeepseekV2Config", dict(KINDS["deepseek_v3"][1])),
    "gpt_oss": ("GptOssConfig", dict(GATED, **FOUR, head_dim=16, sliding_window=16, layer_types=SLIDES)),
    "smollm3": ("SmolLM3Config", GATED),
    "gpt_neox": ("GPTNeoXConfig", dict(HEADS, **NO_DROPOUT, intermediate_size=128)),
    "opt": ("OPTConfig", dict(
        HEADS, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0, attention_dropout=0.0)),
    "opt_350m": ("OPTConfig", dict(
        HEADS, ffn_dim=128, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0,
        do_layer_norm_before=False)),
    "mpt": ("MptConfig", dict(
        DBRX, expansion_ratio=2, resid_pdrop=0.0, emb_pdrop=0.0)),
    "starcoder2": ("Starcoder2Config", dict(GATED, residual_dropout=0.0, embedding_dropout=0.0)),
    "glm": ("GlmConfig", dict(GATED, head_dim=16)), "glm4": ("Glm4Config", dict(GATED, head_dim=16)),
    "ernie4_5": ("Ernie4_5Config", dict(GATED, head_dim=16)),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", dict(GATED, head_dim=16)),
    "nemotron": ("NemotronConfig", GATED),
    "nemotron_h": ("NemotronHConfig", dict(
        GATED, head_dim=16, layers_block_type=["mamba", "attention"], mamba_num_heads=8, mamba_head_dim=16,
        ssm_state_size=16, n_groups=1, chunk_size=16)),
    "minicpm3": ("MiniCPM3Config", dict(
        HEADS, **MLA, num_key_value_heads=4, intermediate_size=128, scale_emb=1, dim_model_base=64)),
    "olmoe": ("OlmoeConfig", dict(GATED, num_experts=4, num_experts_per_tok=2)),
    "gptj": ("GPTJConfig", dict(OLD, rotary_dim=8)),
    "gpt_neo": ("GPTNeoConfig", dict(
        PLAIN, num_layers=2, num_heads=4, max_position_embeddings=256, window_size=16, resid_dropout=0.0,
        attention_types=[[["global", "local"], 1]], embed_dropout=0.0, attention_dropout=0.0)),
    "codegen": ("CodeGenConfig", dict(OLD, rotary_dim=8, n_ctx=256)),
    "gpt_bigcode": ("GPTBigCodeConfig", OLD),
    "persimmon": ("PersimmonConfig", dict(HEADS, **NO_DROPOUT, intermediate_size=128)),
    "xglm": ("XGLMConfig", dict(
        vocab_size=VOCAB, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, dropout=0.0,
        max_position_embeddings=256, attention_dropout=0.0, layerdrop=0.0, bos_token_id=0, eos_token_id=0,
        pad_token_id=1)),
    "biogpt": ("BioGptConfig", dict(
        HEADS | {"pad_token_id": 1}, intermediate_size=128, hidden_dropout_prob=0.0, layerdrop=0.0,
        attention_probs_dropout_prob=0.0)),
    "recurrent_gemma": ("RecurrentGemmaConfig", dict(
        GATED, num_hidden_layers=3, lru_width=64, attention_window_size=64)),
    "exaone4": ("Exaone4Config", dict(GATED, sliding_window=16, layer_types=SLIDES)),
    "helium": ("HeliumConfig", dict(GATED, head_dim=16)), "apertus": ("ApertusConfig", GATED),
    "seed_oss": ("SeedOssConfig", dict(GATED, head_dim=16, residual_dropout=0.0)),
    "diffllama": ("DiffLlamaConfig", GATED), "doge": ("DogeConfig", dict(GATED, hidden_dropout=0.0)),
    "dbrx": ("DbrxConfig", dict(
        DBRX, pad_token_id=None, attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=64, ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2))),
    "longcat_flash": ("LongcatFlashConfig", dict(
        HEADS, **MLA, num_layers=2, ffn_hidden_size=128, expert_ffn_hidden_size=32, n_routed_experts=4,
        zero_expert_num=2, moe_topk=2, head_dim=16)),
    "modernbert_decoder": ("ModernBertDecoderConfig", dict(
        HEADS | {"pad_token_id": 1}, intermediate_size=128, layer_types=SLIDES, local_attention=32,
        cls_token_id=0, sep_token_id=0)),
    "afmoe": ("AfmoeConfig", dict(
        EXPERTS, num_experts=4, num_dense_layers=1, sliding_window=16, layer_types=SLIDES)),
    "nanochat": ("NanoChatConfig", GATED), "bitnet": ("BitNetConfig", GATED),
    "kimi_linear": ("KimiLinearConfig", dict(
        EXPERTS | {"num_key_value_heads": 4}, **MLA, num_experts=4, first_k_dense_replace=1,
        layer_types=HYBRID, linear_attn_config=dict(num_heads=4, head_dim=16, short_conv_kernel_size=4))),
}
SIZES_OF_HF = {key: SIZES[key] for key in (
    "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")}
LEFT_OUT = {"llama", "longrope", "falcon"}  # a second model of a family that is there


def outcome(check, *rest):
    """"yes", "refused" or what went wrong, in a few words."""
    try:
        check(*rest)
        return "yes"
    except AssertionError as error:
        try:
            refusal(rest[2], "train_gsm8k_fsdp2.py" if check is check_rollouts else "train_llm.py")
            return "refused"
        except AssertionError:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return f"no ({lines[-1 if 'Traceback' in str(error) else 0][-120:]})"


def names_on_disk(folder):
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def row(ask, base, family, name, arguments):
    """[loss, packing, export, rollouts]"""
    from transformers import AutoTokenizer

    source = make_model(base / family, name, arguments)
    tokenizer, found = AutoTokenizer.from_pretrained(source), []
    for packing, lengths in ((False, [16, 48, 32, 48] if family == "xlstm" else LENGTHS), (True, FULL)):
        folder, texts = base / f"{family}-{packing}", documents_of(tokenizer, lengths)
        folder.mkdir()
        flags = ["--batch-size", 2, "--no-export"] if packing else ["--no-packing"]
        result = train_once(ask, folder, source, texts, *flags)
        found.append(outcome(check_against, source, folder, result, pieces(tokenizer, texts)))
    exported = base / f"{family}-False" / "run" / "hf"
    same = names_on_disk(exported) == names_on_disk(source)
    found.append("no" if not exported.exists() else "yes" if same else "yes (other names)")
    folder = base / f"{family}-rollouts"
    folder.mkdir()
    found.append(outcome(check_rollouts, source, folder, reinforce_once(ask, folder, source)))
    return found


def main(folder, *families):
    base = Path(folder).absolute()
    base.mkdir()
    known = HF_FAMILIES | {kind: KINDS[kind] for kind in KINDS if kind not in LEFT_OUT} | MORE
    print("| family | loss | packing | export | rollouts |\n|---|---|---|---|---|")
    with open_driver() as ask:
        for family in families or sorted(known):
            name, arguments = known[family]
            arguments = SIZES_OF_HF | arguments if family in HF_FAMILIES else dict(arguments)
            arguments.pop("output_router_logits", None)  # the loss of the tokens alone
            try:
                found = row(ask, base, family, name, arguments)
            except Exception as error:  # of transformers, before any command: this file's sizes are wrong
                found = [f"{type(error).__name__}: {error}"[:150]]
            print(f"| {family} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="new, for the models and runs")
    parser.add_argument("families", nargs="*", help="some of them; if not given: all")
    given = parser.parse_args()
    main(given.folder, *given.families)
