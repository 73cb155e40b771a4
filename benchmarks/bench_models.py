"""A training step of whole models: with torch.nn's modules, after `replace`, and after `fuse`.

Models of the transformers library in the sizes they are used in, but two layers deep, with random
weights and dropout on; the step is forward and backward, without an optimizer. Each row says
between which ratios to torch half of the rounds lie: most of a step is matrix products.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastnorm
from benchmarks.harness import script_of
from fastnorm._bench import Cell, Timer, interleave, pages, summarize

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

CELLS: list[Cell] = []
QUICK = CUDA = CUDA_QUICK = CELLS

# Config class, model class, config, and the input's name and shape (None: token ids).
MODELS: dict[str, tuple[str, str, dict[str, Any], str, tuple[int, ...]]] = {
    "BERT base": (
        "BertConfig",
        "BertModel",
        dict(num_hidden_layers=2, vocab_size=1000),
        "input_ids",
        (2, 128),
    ),
    "ViT base": (
        "ViTConfig",
        "ViTModel",
        dict(num_hidden_layers=2, hidden_dropout_prob=0.1),
        "pixel_values",
        (1, 3, 224, 224),
    ),
    "Llama, 1024 wide": (
        "LlamaConfig",
        "LlamaModel",
        dict(
            num_hidden_layers=2, vocab_size=1000, hidden_size=1024, intermediate_size=2816,
            num_attention_heads=16, use_cache=False,
        ),
        "input_ids",
        (1, 128),
    ),
    "ConvNeXt tiny": (
        "ConvNextConfig",
        "ConvNextModel",
        dict(depths=[1, 1, 2, 1]),
        "pixel_values",
        (2, 3, 160, 160),
    ),
    "T5 base, encoder": (
        "T5Config",
        "T5EncoderModel",
        dict(num_layers=2, vocab_size=1000, d_model=768, d_ff=3072, num_heads=12),
        "input_ids",
        (2, 128),
    ),
    "Wav2Vec2 base": (
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        dict(num_hidden_layers=2, layerdrop=0.0, apply_spec_augment=False),
        "input_values",
        (1, 8000),
    ),
    "ResNet, basic blocks": (
        "ResNetConfig",
        "ResNetModel",
        dict(hidden_sizes=[64, 128], depths=[2, 2], layer_type="basic"),
        "pixel_values",
        (4, 3, 112, 112),
    ),
}  # fmt: skip


def make(name: str, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    config, model, options, argument, shape = MODELS[name]
    torch.manual_seed(0)
    ids = argument == "input_ids"
    x = torch.randint(1000, shape) if ids else torch.randn(shape)
    network = getattr(transformers, model)(getattr(transformers, config)(**options))
    return network.train().to(device), {argument: x.to(device)}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    with torch.no_grad():
        gradient = torch.randn_like(model(**inputs).last_hidden_state)

    def call() -> None:
        model.zero_grad()
        model(**inputs).last_hidden_state.backward(gradient)

    return call


def measurements(device: str, quick: bool) -> list[dict[str, Any]]:
    """Seconds of a step by torch and after `replace` or `fuse`; nothing without transformers."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return []
    rows = []
    seconds = 1.0 if quick or device == "cuda" else 6.0
    for name in list(MODELS)[:1] if quick else MODELS:
        original, inputs = make(name, device)
        replaced, fused = copy.deepcopy(original), copy.deepcopy(original)
        fastnorm.replace(replaced)
        report = fastnorm.fuse(fused, **inputs)
        contenders = {"torch": original, "replaced": replaced}
        if report.fused:
            contenders["fused"] = fused
        with pages("reused"):
            calls = {who: step(model, inputs) for who, model in contenders.items()}
            for call in calls.values():
                call()
            samples, _ = interleave(Timer(device, False), calls, seconds, 5)
        torchs = samples.pop("torch")
        for who, times in samples.items():
            more = f" ({len(report.fused)} norms)" if who == "fused" else ""
            spread = summarize([t / o for t, o in zip(torchs, times, strict=True)])
            rows.append(
                {
                    "name": f"{name}, {who}{more}: {spread['q1']:.2f} to {spread['q3']:.2f}",
                    "unit": "s",
                    "torch": statistics.median(torchs),
                    "fastnorm": statistics.median(times),
                }
            )
    return rows


if __name__ == "__main__":
    raise SystemExit(script_of(__name__))
