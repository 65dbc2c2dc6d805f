"""Character language models: a small GPT on a text file.

The unit of batch sizes is the sequence of 64 characters; its loss is the mean over them.
"""

from __future__ import annotations

import sysconfig
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe, Target
from noisescale.workload import Workload

SEQUENCE_LENGTH = 64
WIDTH = 64
HEADS = 2
LAYERS = 2

TRAIN_SHARE = 0.9
"""The first share of the text trains, the rest validates."""

DEFAULT_MODULES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "difflib", "dis", "fileinput", "fnmatch", "fractions", "ftplib", "functools",
    "getopt", "gettext", "glob", "gzip", "heapq", "inspect", "ipaddress", "linecache",
    "mimetypes", "netrc", "operator", "optparse", "pickle", "platform", "plistlib", "pprint",
    "pstats", "queue", "random",
)  # fmt: skip
"""Pure Python since long before 3.11; about 1 MB together, in alphabetical order."""

Batch = tuple[Tensor, Tensor]
"""Characters (sequences, 64) and the ones that follow them, alike, as numbers."""


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.norm_mlp = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (sequences, length, width) to the same shape."""
        hidden = hidden + self._attend(self.norm_attention(hidden))
        narrowed: Tensor = self.narrow(F.gelu(self.widen(self.norm_mlp(hidden))))
        return hidden + narrowed

    def _attend(self, hidden: Tensor) -> Tensor:
        sequences, length, _ = hidden.shape
        heads = self.query_key_value(hidden).view(sequences, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.project(mixed.transpose(1, 2).reshape(sequences, length, WIDTH))
        return projected


class CharacterGPT(nn.Module):
    """Two blocks, width 64, 2 heads, learnt positions, untied head.

    Args:
        vocabulary: number of characters.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(SEQUENCE_LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, characters: Tensor) -> Tensor:
        """Map characters (sequences, length) to logits (sequences, length, vocabulary)."""
        places = torch.arange(characters.shape[1], device=characters.device)
        # Expanded so that each sequence looks its positions up: a gradient per sequence exists.
        hidden = self.characters(characters) + self.positions(places.expand_as(characters))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def chars(text: str | None = None) -> Workload:
    """The character GPT on a text file; without one, on the standard library's own source.

    Args:
        text: path of a UTF-8 text.

    Raises:
        InvalidInputError: the file cannot be read or is too short.
    """
    content = standard_library_source() if text is None else _read(Path(text))
    return _workload("chars", content, goal="validation_loss<2.2")


def shakespeare(file: Path) -> Workload:
    """The character GPT on Shakespeare's plays."""
    return _workload("shakespeare", _read(file), goal="validation_loss<2.2")


def standard_library_source() -> str:
    """Join the source of :data:`DEFAULT_MODULES`, printable ASCII and line ends only.

    It differs a little between Python versions; within one it is always the same.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{name}.py" for name in DEFAULT_MODULES]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    if not texts:
        raise InvalidInputError(
            "workload 'chars'",
            "this Python has no source files of its standard library",
            "give a text: --set text=FILE",
        )
    joined = "\n".join(texts).expandtabs(4)
    return "".join(letter for letter in joined if letter == "\n" or " " <= letter <= "~")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InvalidInputError(
            f"text {str(file)!r}",
            f"a readable UTF-8 file is required ({type(problem).__name__})",
            "check the path",
        ) from None


def _workload(name: str, text: str, *, goal: str) -> Workload:
    symbols = sorted(set(text))
    number = {symbol: place for place, symbol in enumerate(symbols)}
    numbers = torch.tensor([number[symbol] for symbol in text], dtype=torch.long)
    cut = int(TRAIN_SHARE * len(numbers))
    train, evaluate = _sequences(numbers[:cut]), _sequences(numbers[cut:])
    if not len(evaluate[0]) or len(train[0]) < 2:
        raise InvalidInputError(
            f"text of {len(text)} characters",
            f"at least {10 * SEQUENCE_LENGTH + 20} are required",
            "give a longer text",
        )
    return Workload(
        name=name,
        model=partial(CharacterGPT, len(symbols)),
        loss=next_character_loss,
        train=train,
        evaluate=evaluate,
        recipe=Recipe(
            optimizer="adamw",
            lr=6e-3,
            betas=(0.9, 0.99),
            batch_size=min(32, len(train[0])),
            unit="sequences",
            sequence_length=SEQUENCE_LENGTH,
            dataset_size=len(train[0]),
        ),
        target=Target.parse(goal),
    )


def next_character_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next character, in nats; a scalar."""
    characters, following = batch
    return F.cross_entropy(model(characters).flatten(0, 1), following.flatten())


def _sequences(numbers: Tensor) -> Batch:
    """Cut (characters,) into non-overlapping (sequences, 64) and their successors."""
    count = max(0, (len(numbers) - 1) // SEQUENCE_LENGTH)
    end = count * SEQUENCE_LENGTH
    shape = (count, SEQUENCE_LENGTH)
    return numbers[:end].reshape(shape), numbers[1 : end + 1].reshape(shape)
