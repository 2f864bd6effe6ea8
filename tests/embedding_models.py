"""Small random encoders and decoders, the real MiniLM, pairs, and the embedding loss in plain autograd."""

import itertools
import json
import math
import os
import zlib
from argparse import Namespace
from pathlib import Path

from helpers import GATED, SIZES, make_tokenizer

# Family: (configuration class of transformers, its arguments). No dropout: gradients are compared.
ENCODER = dict(SIZES, intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
FAMILIES = {
    "bert": ("BertConfig", ENCODER),
    "modernbert": ("ModernBertConfig", dict(SIZES, intermediate_size=128, local_attention=8)),
    "xlm_roberta": ("XLMRobertaConfig", ENCODER),
    "qwen3": ("Qwen3Config", dict(GATED, head_dim=16)),
    "llama": ("LlamaConfig", GATED),
    "gemma3": ("Gemma3TextConfig", dict(GATED, head_dim=16, query_pre_attn_scalar=16, sliding_window=16,
                                        layer_types=["sliding_attention", "full_attention"])),
}


def make_embedder(family, folder, head=False, **more):
    """Save a small random model of a family with a tokenizer; `head`: as a checkpoint of the family's model
    with a language-modelling head, whose tensors stand under a prefix. Returns `folder`."""
    import torch
    import transformers

    make_tokenizer(folder, 500)
    end = transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    name, arguments = FAMILIES[family]
    special = {f"{token}_token_id": end for token in ("bos", "eos", "pad", "cls", "sep")}
    config = getattr(transformers, name)(**arguments | more, vocab_size=512, initializer_range=0.1, **special)
    kind = transformers.AutoModel
    if head:
        is_decoder = family in ("qwen3", "llama", "gemma3")
        kind = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModelForMaskedLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


# Qwen3-VL's, without tools: each turn is a list of parts, an image is one placeholder.
VL_TEMPLATE = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\\n' }}{% for part in turn.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
# Qwen3-VL's own processor holds one of videos, too, which needs torchvision: the rest of it is used here.
VL_PROCESSOR = """from transformers import Qwen3VLProcessor


class ImageProcessor(Qwen3VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        Qwen3VLProcessor.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)
"""
VL_FLAGS = ["--trust-remote-code", "--seq-len", "160", "--query-prompt", "Represent the user's input.",
            "--document-prompt", "Represent the user's input."]


def make_vl_embedder(folder):
    """Save a small random Qwen3-VL, as a checkpoint of the model that writes, with its processor; it makes up
    to 16 tokens of an image. Returns `folder`."""
    import torch
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    make_tokenizer(folder, 500)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    media = [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *media]})
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=4, min_pixels=256, max_pixels=1024).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(VL_TEMPLATE)
    (folder / "processing_small.py").write_text(VL_PROCESSOR)
    (folder / "processor_config.json").write_text(json.dumps(
        {"auto_map": {"AutoProcessor": "processing_small.ImageProcessor"}}))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = transformers.Qwen3VLConfig(
        text_config=dict(GATED, head_dim=16, vocab_size=512, initializer_range=0.1, rope_parameters=rope),
        vision_config=dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=64, patch_size=4,
                           out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0],
                           initializer_range=0.1),
        **dict(zip(names, tokenizer.convert_tokens_to_ids(media))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
    return folder


def draw_pictures(folder, count):
    """Images 0.png, 1.png, … in `folder`, each of another size and look; returns `folder`."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        color = (i * 50 % 256, i * 90 % 256, i * 30 % 256)
        image = Image.new("RGB", (20 + 7 * (i % 4), 16 + 5 * (i % 3)), color)
        ImageDraw.Draw(image).rectangle([2, 3, 8 + i % 7, 12], fill=(255, 255 - i, 0))
        image.save(folder / f"{i}.png")
    return folder


def minilm():
    """The real all-MiniLM-L6-v2; without it the test is skipped."""
    import pytest

    folder = os.environ.get("REAL_EMBEDDER")
    if not folder:
        pytest.skip("needs a real model (bash tests/run.sh --all makes it, or REAL_EMBEDDER names it)")
    return Path(folder)


# ----------------------------------------------------------------------------------------------------
# Pairs

THINGS = ["a red apple", "the old house", "seven green boats", "a dog that sleeps", "warm rain in May",
          "the last train", "bread with butter", "a letter from home"]


def make_pairs(count, num_negatives=0, scored=False):
    """Rows with texts of different lengths; where there are negatives, every third row lacks its last one."""
    rows = []
    for i in range(count):
        thing, other = THINGS[i % 8], THINGS[(i + 3) % 8]
        row = {"query": f"Where is {thing}, number {i}?", "positive": f"Number {i}: {thing} is "
               + "near the river, " * (i % 4 + 1) + "as always."}
        if num_negatives:
            found = [f"{other} of number {i}, choice {k}" for k in range(num_negatives)]
            row["negatives"] = found[:-1] if i % 3 == 0 else found
        if scored:
            row["score"] = (i * 7 % 5) / 4
        rows.append(row)
    return rows


def add_pictures(rows, folder="pictures"):
    """Of every four rows one gets an image beside its positive, one in place of its query, one both, and one
    neither; the images are those of `draw_pictures`."""
    rows = [dict(row) for row in rows]
    for i, row in enumerate(rows):
        if i % 4 in (0, 2):
            row["positive_image"] = f"{folder}/{i}.png"
        if i % 4 in (1, 2):
            row["query_image"] = f"{folder}/{i + 1}.png"
            row["query"] = None if i % 4 == 1 else row["query"]
    return rows


def write_pairs(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------------------------------
# The loss again, text by text, from its formula alone

def plain_embeddings(model, tokenizer, texts, pooling="mean"):
    """(N, D): each text by itself, so without padding."""
    import torch

    rows = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        hidden = model(**inputs).last_hidden_state[0]
        rows.append({"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling])
    return torch.stack(rows)


def plain_vl_embeddings(model, processor, items, folder):
    """(N, D) of texts and (text, image) as Qwen3-VL-Embedding's published code makes them, one by one."""
    import torch
    from PIL import Image

    rows = []
    for item in items:
        text, image = (item, None) if isinstance(item, str) else item
        text = ("<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
                + "<|vision_start|><|image_pad|><|vision_end|>" * bool(image) + (text or "")
                + "<|im_end|>\n<|im_start|>assistant\n")
        images = [Image.open(folder / image)] if image else None
        inputs = processor(text=[text], images=images, return_tensors="pt")
        rows.append(model(**inputs).last_hidden_state[0, -1])
    return torch.stack(rows)


def items_of(rows):
    """The rows with (text, image) in place of a text that has an image."""
    return [row | {name: (row[name], row[f"{name}_image"]) for name in ("query", "positive")
                   if row.get(f"{name}_image")} for row in rows]


def plain_loss(embed, rows, scale, dims, num_negatives=0, symmetric=False):
    """The mean loss of a batch; `embed` makes (N, D) of texts, `dims` are (dimension, weight)."""
    import torch
    import torch.nn.functional as F

    queries, positives = [row["query"] for row in rows], [row["positive"] for row in rows]
    negatives = [text for row in rows for text in row.get("negatives", [])[:num_negatives]]
    documents = positives + negatives
    q_all, d_all = embed(queries), embed(documents)
    total = 0.0
    for d, weight in dims:
        q, p = F.normalize(q_all[:, :d], dim=-1), F.normalize(d_all[:, :d], dim=-1)
        if "score" in rows[0]:
            cosines = (q * p).sum(-1)
            terms = [torch.zeros_like(cosines[0])] + [scale * (cosines[i] - cosines[j])
                                         for i, j in itertools.product(range(len(rows)), repeat=2)
                                         if rows[i]["score"] < rows[j]["score"]]
            total = total + weight * torch.stack(terms).logsumexp(0)
            continue
        losses = []
        for i in range(len(rows)):
            right = {positives[j] for j in range(len(rows)) if queries[j] == queries[i]} | {queries[i]}
            kept = [j for j, text in enumerate(documents) if j == i or not (
                text in (positives[i], queries[i]) or (j < len(rows) and text in right and
                                                       queries[j] == queries[i]))]
            loss = (scale * p[kept] @ q[i]).logsumexp(0) - scale * p[i] @ q[i]
            if symmetric:
                kept = [j for j in range(len(rows)) if j == i or not (
                    queries[j] in (queries[i], positives[i]) or positives[j] == positives[i])]
                loss = (loss + (scale * q[kept] @ p[i]).logsumexp(0) - scale * p[i] @ q[i]) / 2
            losses.append(loss)
        total = total + weight * torch.stack(losses).mean()
    return total


# ----------------------------------------------------------------------------------------------------
# Cases of the gradient proofs: (rows, flags)

def twice(rows):
    """Texts that stand in the batch again, on the same rank and on another."""
    rows = [dict(row) for row in rows]
    rows[3]["positive"] = rows[0]["positive"]
    rows[6]["query"], rows[7]["positive"] = rows[1]["query"], rows[2]["query"]
    return rows


def some_pictures():
    """Images on the first of two ranks only; a text with an image twice, and the text with another image."""
    rows = add_pictures(make_pairs(4)) + make_pairs(8)[4:]
    rows[2] |= {"positive": rows[0]["positive"], "positive_image": rows[0]["positive_image"]}
    rows[3] |= {"positive": rows[0]["positive"], "positive_image": "pictures/3.png"}
    return rows


CASES = {
    "plain": (make_pairs(8), []),
    "cached": (make_pairs(8), ["--grad-cache-chunk", "3"]),
    "cached_whole": (make_pairs(8), ["--grad-cache-chunk", "100"]),
    "reduced_always": (make_pairs(8), ["--grad-cache-chunk", "3", "--reduce-every-micro-batch"]),
    "negatives": (make_pairs(8, 2), ["--grad-cache-chunk", "3", "--num-negatives", "2"]),
    "negatives_uncached": (make_pairs(8, 2), ["--num-negatives", "2"]),
    "matryoshka": (make_pairs(8, 1), ["--grad-cache-chunk", "5", "--num-negatives", "1", "--symmetric",
                                      "--mrl-dims", "64,32,8", "--mrl-weights", "1,0.5,0.25"]),
    "equal_texts": (twice(make_pairs(8, 1)), ["--grad-cache-chunk", "3", "--num-negatives", "1",
                                              "--symmetric"]),
    "temperature": (make_pairs(8), ["--grad-cache-chunk", "3", "--learn-temperature",
                                    "--temperature", "0.1"]),
    "temperature_uncached": (make_pairs(8), ["--learn-temperature", "--temperature", "0.1"]),
    "scored": (make_pairs(8, scored=True), ["--grad-cache-chunk", "3", "--mrl-dims", "64,16"]),
    "recomputed": (make_pairs(8), ["--grad-cache-chunk", "3", "--activation-checkpointing", "full"]),
}


CASES |= {
    "pictures": (some_pictures(), VL_FLAGS),
    "pictures_cached": (some_pictures(), [*VL_FLAGS, "--grad-cache-chunk", "3"]),
    "pictures_recomputed": (some_pictures(), [*VL_FLAGS, "--grad-cache-chunk", "3", "--symmetric",
                                              "--activation-checkpointing", "full"]),
}

# For the real model, which finds its way among the right pairs: with a loss of 0 all gradients are rounding.
WRONG = [row | {"positive": other["positive"]} for row, other in zip(make_pairs(8), make_pairs(9)[1:])]
WRONG_NEGATIVES = [row | {"negatives": other["negatives"]} for row, other in zip(
    WRONG, [row for row in make_pairs(14, 2) if len(row["negatives"]) == 2])]
CASES |= {
    "real_plain": (WRONG, []),
    "real_cached": (WRONG, ["--grad-cache-chunk", "3"]),
    "real_negatives": (WRONG_NEGATIVES, ["--grad-cache-chunk", "3", "--num-negatives", "2"]),
    "real_matryoshka": (WRONG, ["--mrl-dims", "384,192,48", "--mrl-weights", "1,0.5,2"]),
    "real_scored": (make_pairs(8, scored=True), ["--grad-cache-chunk", "3"]),
}


def case_args(script, model, case, *more) -> Namespace:
    """Parsed flags; the rows of the case take the place of --dataset."""
    flags = CASES[case][1]
    recompute = [] if "--activation-checkpointing" in flags else ["--activation-checkpointing", "none"]
    return script.parse_args(["--model", str(model), "--dataset", str(model), "--seq-len", "64", "--device",
                              "cpu", "--no-mixed-precision", *recompute, *flags, *more])


def draw_adapters(model):
    """Adapters whose B is not zero, the same in any sharding."""
    import torch

    for name, param in model.named_parameters():
        if ".lora_" in name:
            part = param.to_local() if hasattr(param, "to_local") else param
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            value = torch.randn(param.shape, generator=generator) / 8
            if hasattr(param, "placements"):
                from torch.distributed.tensor import distribute_tensor
                value = distribute_tensor(value, param.device_mesh, param.placements,
                                          src_data_rank=None).to_local()
            part.data.copy_(value)


def plain_gradients(script, model_folder, case, args, dtype):
    """(loss, {name: gradient}) of the whole batch in this process, by transformers and autograd alone."""
    import torch
    from transformers import AutoModel, AutoProcessor, AutoTokenizer

    model, rows = AutoModel.from_pretrained(model_folder, dtype=dtype).train(), items_of(CASES[case][0])
    if args.attention:
        model.config.is_causal = args.attention == "causal"
    if args.lora_rank:
        import peft
        names = {path.rpartition(".")[2] for path, layer in model.layers.named_modules()
                 if isinstance(layer, torch.nn.Linear)}
        config = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=names)
        peft.inject_adapter_in_model(config, model)
        draw_adapters(model)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def embed(items):
        if "pictures" not in case:
            return plain_embeddings(model, tokenizer, items, args.pooling)
        processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)
        return plain_vl_embeddings(model, processor, items, Path(model_folder))

    log_scale = torch.tensor([-math.log(args.temperature)], dtype=dtype, requires_grad=True)
    dims = script.read_objective(args).dims
    loss = plain_loss(embed, rows, log_scale.exp().squeeze(), dims, args.num_negatives, args.symmetric)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if args.learn_temperature:
        gradients["log_scale"] = log_scale.grad
    return loss.item(), gradients
