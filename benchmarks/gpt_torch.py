"""The transformer of examples/toy_transformer.py and that of nanoGPT, in plain `torch.nn`."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, size, num_heads, make_norm, activation):
        super().__init__()
        self.num_heads, self.activation = num_heads, activation
        self.attention_norm, self.mlp_norm = make_norm(size), make_norm(size)
        self.query_key_value = nn.Linear(size, 3 * size, bias=False)
        self.output = nn.Linear(size, size, bias=False)
        self.expand = nn.Linear(size, 4 * size, bias=False)
        self.contract = nn.Linear(4 * size, size, bias=False)

    def forward(self, x):
        batch, sequence, size = x.shape
        heads = self.query_key_value(self.attention_norm(x)).split(size, dim=2)
        heads = [h.view(batch, sequence, self.num_heads, -1).transpose(1, 2) for h in heads]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, sequence, size))
        return x + self.contract(self.activation(self.expand(self.mlp_norm(x))))


class GPT(nn.Module):
    def __init__(
        self,
        vocab_size,
        sequence_length,
        num_layers,
        num_heads,
        size,
        make_norm=lambda size: nn.RMSNorm(size, eps=1e-6, elementwise_affine=False),
        activation=lambda x: nn.functional.relu(x).square(),
        input_scale=None,
    ):
        super().__init__()
        self.input_scale = size**0.5 if input_scale is None else input_scale
        self.tokens = nn.Embedding(vocab_size, size)
        self.positions = nn.Embedding(sequence_length, size)
        self.blocks = nn.Sequential(
            *(Block(size, num_heads, make_norm, activation) for _ in range(num_layers))
        )
        self.norm = make_norm(size)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        hidden = self.norm(self.blocks(x * self.input_scale))
        return nn.functional.linear(hidden, self.tokens.weight)


def nano_gpt(vocab_size, sequence_length, num_layers, num_heads, size):
    """nanoGPT's model: LayerNorm, GELU, no biases, and its initial parameters."""
    model = GPT(
        vocab_size,
        sequence_length,
        num_layers,
        num_heads,
        size,
        make_norm=lambda size: nn.LayerNorm(size, bias=False),
        activation=nn.functional.gelu,
        input_scale=1.0,
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            last = name.endswith(("output.weight", "contract.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5 if last else 0.02)
    return model


def loss_of(model, tokens):
    tokens = torch.from_numpy(tokens.astype("int64"))
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Training:
    """Training steps with AdamW and a learning rate for each step, in eager mode or compiled."""

    def __init__(self, model, rates, weight_decay, clip_norm, compiled=False):
        self.model, self.rates, self.clip_norm = model, iter(rates), clip_norm
        self.run = torch.compile(model) if compiled else model
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))

    def __call__(self, tokens):
        rate = next(self.rates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = loss_of(self.run, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.item()


def toy(sizes, weights):
    """The transformer of the example with the given weights, of shape (outputs, inputs)."""
    model = GPT(**sizes)
    tokens, positions, blocks = weights
    with torch.no_grad():
        model.tokens.weight.copy_(torch.from_numpy(tokens))
        model.positions.weight.copy_(torch.from_numpy(positions))
        names = "query_key_value", "output", "expand", "contract"
        for block, matrices in zip(model.blocks, blocks):
            for name, matrix in zip(names, matrices):
                getattr(block, name).weight.copy_(torch.from_numpy(matrix))
    return model
