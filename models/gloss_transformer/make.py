"""A transformer encoder that reads the definition of an English noun and says which of 25 kinds it is, act to time.

Data: WordNet 3.0 (Princeton University; WORDNET_LICENSE beside this file allows redistribution). Text: the gloss of
each noun synset without its quoted examples. Label: its lexicographer file ("noun.animal", ...), Tops left out. Texts
of equal tokens are kept once, so none is in two splits. Metric: top-1 accuracy on 4,000 held-out definitions (answering
the commonest kind every time: 0.15).
Inputs `input_ids` and `attention_mask`, int64 [batch, sequence], sequence <= 32. Output `logits` float32 [batch, 25].

`python -m models.gloss_transformer.make` trains on the .npz files beside it (about five minutes on one core); with
`--wordnet /usr/share/wordnet` it first makes those and vocabulary.txt again from data.noun (Debian: wordnet-base).
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from models import common

HERE = pathlib.Path(__file__).parent
KINDS = [
    "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food",
    "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
    "quantity", "relation", "shape", "state", "substance", "time",
]  # fmt: skip
WORDS, ENDINGS, LENGTH = 3600, 400, 32
WIDTH, LAYERS, HEADS = 64, 3, 4
EPOCHS, BATCH, RATE = 12, 128, 2e-3


def glosses(wordnet: pathlib.Path) -> dict[str, int]:
    """Definition -> kind, from the lines "offset lex_filenum n ... | gloss" of data.noun (WordNet manual, wndb)."""
    found = {}
    for line in (wordnet / "data.noun").read_text().splitlines():
        if line.startswith("  "):  # the licence
            continue
        head, gloss = line.split(" | ", 1)
        kind = int(head.split()[1]) - 4  # 03 is noun.Tops, 04 noun.act
        if kind >= 0:
            found.setdefault(re.split(r'[;:]\s*"', gloss)[0].strip().lower(), kind)
    return found


def make_data(wordnet: pathlib.Path) -> None:
    """Write vocabulary.txt, train.npz, calib.npz and eval.npz.

    A word of the vocabulary is one token; any other word is its last three letters ("##ism") or [unk].
    """
    found = list(glosses(wordnet).items())
    found = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    words = [re.findall(r"[a-z]+|[0-9]+", text) for text, _ in found]

    count = collections.Counter(word for text in words[5000:] for word in text)  # all of these land in train
    vocabulary = ["[pad]", "[unk]", *(word for word, _ in count.most_common(WORDS))]
    endings: collections.Counter[str] = collections.Counter()
    for word in sorted(count.keys() - set(vocabulary)):
        endings["##" + word[-3:]] += count[word]
    vocabulary += [ending for ending, _ in endings.most_common(ENDINGS)]
    (HERE / "vocabulary.txt").write_text("\n".join(vocabulary) + "\n")

    token = {text: i for i, text in enumerate(vocabulary)}
    kind_of: dict[tuple[int, ...], int] = {}
    for text, (_, kind) in zip(words, found, strict=True):
        if text:
            kind_of.setdefault(tuple(token.get(w, token.get("##" + w[-3:], 1)) for w in text[:LENGTH]), kind)
    ids = np.array([row + (0,) * (LENGTH - len(row)) for row in kind_of], np.uint16)
    mask, kinds = (ids > 0).astype(np.uint8), np.array(list(kind_of.values()), np.uint8)
    for name, part in {"eval": slice(4000), "calib": slice(4000, 4256), "train": slice(4256, None)}.items():
        np.savez_compressed(HERE / f"{name}.npz", input_ids=ids[part], attention_mask=mask[part], y=kinds[part])


class Layer(nn.Module):
    """Self-attention and a Gelu network, each with a residual and LayerNormalization behind it (as in BERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        batch, sequence = x.shape[:2]
        q, k, v = (
            layer(x).view(batch, sequence, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5 + bias
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, sequence, WIDTH)
        x = self.norm1(x + self.drop(self.out(mixed)))
        return self.norm2(x + self.drop(self.down(F.gelu(self.up(x)))))


class Net(nn.Module):
    """Token and position embeddings, three layers, the mean over the tokens that are not padding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.2)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, len(KINDS))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask.to(torch.float32)
        bias = (mask.unsqueeze(1).unsqueeze(1) - 1) * 1e4
        x = self.token(input_ids) + self.position(torch.arange(input_ids.shape[1], device=input_ids.device))
        x = self.drop(self.norm(x))
        for layer in self.layers:
            x = layer(x, bias)
        pooled = (x * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        return self.head(self.drop(pooled))


def batches(lengths: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """Random batches of similar length, so that little padding is computed."""
    order = generator.permutation(len(lengths))
    order = order[np.argsort(lengths[order] + generator.uniform(0, 2, len(lengths)), kind="stable")]
    found = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return [found[i] for i in generator.permutation(len(found))]


def train(data: dict[str, np.ndarray], vocabulary: int) -> Net:
    """AdamW, one-cycle rate, label smoothing, one word in ten replaced by [unk]."""
    net = Net(vocabulary)
    nn.init.normal_(net.token.weight, std=0.05)
    nn.init.normal_(net.position.weight, std=0.05)
    ids, mask = (torch.from_numpy(data[name].astype(np.int64)) for name in ("input_ids", "attention_mask"))
    labels, lengths = torch.from_numpy(data["y"].astype(np.int64)), data["attention_mask"].sum(1)
    generator = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * -(-len(ids) // BATCH), pct_start=0.15)
    for epoch in range(EPOCHS):
        total = 0.0
        for pick in batches(lengths, generator):
            width = int(lengths[pick].max())
            x, seen = ids[pick, :width], mask[pick, :width]
            x = torch.where((torch.rand(x.shape) < 0.1) & (seen > 0), 1, x)
            loss = F.cross_entropy(net(x, seen), labels[pick], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(pick)
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {total / len(ids):.4f}", flush=True)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=pathlib.Path, help="folder of WordNet's data.noun: make the data again")
    wordnet = parser.parse_args().wordnet
    if wordnet:
        make_data(wordnet)
    common.seed(0)
    data = {name: dict(np.load(HERE / f"{name}.npz")) for name in ("train", "eval")}
    vocabulary = len((HERE / "vocabulary.txt").read_text().splitlines())
    net = train(data["train"], vocabulary)
    feeds = {"input_ids": torch.ones(2, 7, dtype=torch.long), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    model = common.export(net, feeds, {name: {0: "batch", 1: "sequence"} for name in feeds})
    common.save(model, HERE / "model.onnx")
    common.card(HERE, data["eval"], licence="WordNet 3.0 noun glosses, WordNet licence", labels=KINDS)


if __name__ == "__main__":
    main()
