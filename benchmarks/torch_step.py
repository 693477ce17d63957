"""Cross-Scale MAE's training step in PyTorch, on Hugging Face's MAE, for comparison.

It computes the official step on a model that anyone can install: two views through
`ViTMAEForPreTraining`, the reconstruction of both, the contrastive loss of their mean
visible tokens, the cross-prediction of the decoder's tokens, and AdamW.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

# Only nn.init and the masks depend on it.
SEED = 0


def create_mae(
    model: Mapping[str, Any], *, size: int, channels: int
) -> transformers.ViTMAEForPreTraining:
    """Hugging Face's MAE with the sizes of our `config.model`, for `size` px images."""
    config = transformers.ViTMAEConfig(
        image_size=size,
        patch_size=model["patch_size"],
        num_channels=channels,
        hidden_size=model["embed_dim"],
        num_hidden_layers=model["depth"],
        num_attention_heads=model["num_heads"],
        intermediate_size=int(model["embed_dim"] * model["mlp_ratio"]),
        decoder_hidden_size=model["decoder_embed_dim"],
        decoder_num_hidden_layers=model["decoder_depth"],
        decoder_num_attention_heads=model["decoder_num_heads"],
        decoder_intermediate_size=int(model["decoder_embed_dim"] * model["mlp_ratio"]),
        mask_ratio=model["mask_ratio"],
        layer_norm_eps=model["norm_epsilon"],
        norm_pix_loss=True,
    )
    return transformers.ViTMAEForPreTraining(config)


class CrossScale(nn.Module):
    """The three losses of images [2 * batch, channels, height, width].

    View 1 of all samples comes first, then view 2.
    """

    def __init__(self, mae: transformers.ViTMAEForPreTraining, *, temperature: float):
        super().__init__()
        config = mae.config
        width = config.decoder_hidden_size
        patches = mae.vit.embeddings.patch_embeddings.num_patches
        self.mae, self.temperature = mae, temperature
        self.predictor = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.BatchNorm1d(patches),
            nn.ReLU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss terms in float32."""
        return self.losses(*self.outputs(images))

    def outputs(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The reconstruction loss, and the tokens of encoder and decoder."""
        tokens = []
        norms = (self.mae.vit.layernorm, self.mae.decoder.decoder_norm)
        hooks = [
            norm.register_forward_hook(lambda module, args, out: tokens.append(out))
            for norm in norms
        ]
        reconstruction = self.mae(images).loss
        for hook in hooks:
            hook.remove()
        return reconstruction, *tokens

    def losses(
        self,
        reconstruction: torch.Tensor,
        encoder_tokens: torch.Tensor,
        decoder_tokens: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The three loss terms, with our names."""
        embedding = encoder_tokens[:, 1:].float().mean(dim=1)
        first, second = decoder_tokens[:, 1:].chunk(2)
        predicted = self.predictor(second).float()
        return {
            "reconstruction": reconstruction,
            "contrastive": contrastive(embedding, self.temperature),
            "cross_prediction": F.mse_loss(predicted, first.detach().float()),
        }


def contrastive(embedding: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent of [2 * batch, width]; view 1 of all samples first, then view 2."""
    z = F.normalize(embedding, dim=-1)
    size = z.shape[0]
    itself = torch.eye(size, dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    other = torch.arange(size, device=z.device).roll(size // 2)
    return F.cross_entropy(logits, other)


def create_step(
    model: Mapping[str, Any],
    *,
    size: int,
    channels: int,
    temperature: float,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    dtype: str,
    compiled: bool,
    device: str = "cpu",
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns step(images) -> loss, which does one update.

    `bfloat16` uses autocast, as users do; parameters are float32. Images and the loss
    are on `device`.
    """
    torch.manual_seed(SEED)
    module = CrossScale(
        create_mae(model, size=size, channels=channels), temperature=temperature
    )
    module = module.to(device).train()
    learned = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    forward = torch.compile(module) if compiled else module

    def autocast():
        if dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device, dtype=torch.bfloat16)

    def step(images: torch.Tensor) -> torch.Tensor:
        with autocast():
            total = sum(forward(images).values())
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.detach()

    return step
