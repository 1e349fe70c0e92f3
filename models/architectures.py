"""The four networks that ``train.py`` trains, all from 1x28x28 images to 10 logits."""

import torch
from torch import Tensor, nn


class LeNet300(nn.Module):
    """Fully connected 784-300-100-10, as in LeCun et al. (1998)."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)
        self.relu = nn.ReLU()

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.relu(self.fc1(self.flatten(image)))
        return self.fc3(self.relu(self.fc2(x)))


class LeNet5(nn.Module):
    """LeNet-5 in the Caffe form: no activation between a convolution and its pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)
        self.relu = nn.ReLU()

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.pool(self.conv2(self.pool(self.conv1(image))))
        return self.fc2(self.relu(self.fc1(self.flatten(x))))


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalization and, unless linear, a ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.Identity() if linear else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps after the layers."""
        return self.relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps after the join."""
        return self.relu(self.body(x) + self.shortcut(x))


class Branches(nn.Module):
    """The outputs of several paths over the same input, concatenated by channel."""

    def __init__(self, *paths: nn.Module) -> None:
        super().__init__()
        self.paths = nn.ModuleList(paths)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps after the join."""
        return torch.cat([path(x) for path in self.paths], dim=1)


class ResidualCNN(nn.Module):
    """One of each join and convolution a channel-removing pass has to understand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 16, 3)
        # The shortcut of the first downsampling is a strided convolution, that of the
        # second an average pool followed by a convolution.
        self.down1 = Residual(
            nn.Sequential(
                ConvNorm(16, 24, 3, stride=2), ConvNorm(24, 24, 3, linear=True)
            ),
            ConvNorm(16, 24, 1, stride=2, linear=True),
        )
        self.depthwise = Residual(
            nn.Sequential(
                ConvNorm(24, 48, 1),
                ConvNorm(48, 48, 3, groups=48),
                ConvNorm(48, 24, 1, linear=True),
            )
        )
        self.down2 = Residual(
            nn.Sequential(
                ConvNorm(24, 64, 3, stride=2), ConvNorm(64, 64, 3, linear=True)
            ),
            nn.Sequential(nn.AvgPool2d(2), ConvNorm(24, 64, 1, linear=True)),
        )
        self.grouped = Residual(
            nn.Sequential(
                ConvNorm(64, 96, 1),
                ConvNorm(96, 96, 3, groups=8),
                ConvNorm(96, 64, 1, linear=True),
            )
        )
        self.branches = Branches(ConvNorm(64, 32, 1), ConvNorm(64, 64, 3))
        self.mix = ConvNorm(96, 128, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.depthwise(self.down1(self.stem(image)))
        x = self.grouped(self.down2(x))
        x = self.mix(self.branches(x))
        return self.fc(self.flatten(self.pool(x)))


class Attention(nn.Module):
    """Multi-head self-attention written with matrix products and a softmax."""

    def __init__(self, tokens: int, width: int, heads: int) -> None:
        super().__init__()
        self.split = (-1, tokens, heads, width // heads)
        self.merged = (-1, tokens, width)
        self.scale = (width // heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens after looking at each other."""
        query = self.query(x).reshape(self.split).permute(0, 2, 1, 3)
        key = self.key(x).reshape(self.split).permute(0, 2, 3, 1)
        value = self.value(x).reshape(self.split).permute(0, 2, 1, 3)
        weights = self.softmax(query @ key * self.scale)
        return self.out((weights @ value).permute(0, 2, 1, 3).reshape(self.merged))


class Block(nn.Module):
    """Transformer block with the normalization before each half."""

    def __init__(self, tokens: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(tokens, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens after the block."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """25 overlapping patches of 8x8 pixels, four blocks, the mean of the tokens."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        tokens = 25
        self.patch = nn.Conv2d(1, width, kernel_size=8, stride=5)
        self.tokens = (-1, width, tokens)
        self.position = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(tokens, width, heads, hidden=3 * width) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.patch(image).reshape(self.tokens).permute(0, 2, 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))
