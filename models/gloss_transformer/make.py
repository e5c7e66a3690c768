"""A transformer encoder that reads the definition of an English noun and says which of 25 kinds it is, act to time.

Data: WordNet 3.0 (Princeton University; WORDNET_LICENSE beside this file allows redistribution). Text: the gloss of
each noun synset without its quoted examples. Label: its lexicographer file ("noun.animal", ...), Tops left out. Texts
of equal tokens are kept once, so none is in two splits. Metric: top-1 accuracy on 4,000 held-out definitions (answering
the commonest kind every time: 0.15).
Inputs `input_ids` and `attention_mask`, int64 [batch, sequence], sequence <= 32. Output `logits` float32 [batch, 25].

`python -m models.gloss_transformer.make` trains on the .npz files beside it (about ten minutes on one core); with
`--wordnet /usr/share/wordnet` it first makes those and vocabulary.txt again from data.noun (Debian: wordnet-base).
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re

import numpy as np
import onnx

from models import common
from onnxcompress.training.settings import Settings

HERE = pathlib.Path(__file__).parent
KINDS = [
    "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food",
    "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
    "quantity", "relation", "shape", "state", "substance", "time",
]  # fmt: skip
WORDS, ENDINGS, LENGTH = 3600, 400, 32
WIDTH, LAYERS, HEADS = 64, 3, 4
SETTINGS = Settings(epochs=12, batch=128, lr=2e-3, weight_decay=0.05, warmup=0.15, relative=False, ema=0.999)
SMOOTHING = 0.1


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


class Network(common.Network):
    """Token and position embeddings, three layers, the mean over the tokens that are not padding.

    `noise`: as it is trained, with Dropout and one word in ten unknown. Each method returns the name of its output.
    """

    def __init__(self, vocabulary: int, *, noise: bool) -> None:
        axes: list[common.Dim] = ["batch", "sequence"]
        ports = [(name, onnx.TensorProto.INT64, axes) for name in ("input_ids", "attention_mask")]
        super().__init__("gloss_transformer", ports, len(KINDS))
        self.noise = noise
        self.one = self.constant("one", np.array(1, np.float32))
        mask = self.add("Cast", ["attention_mask"], "mask", to=onnx.TensorProto.FLOAT)
        x = self._drop(self._norm(self._embedding(vocabulary, mask), "norm"), 0.2)
        bias = self._bias(mask)
        for index in range(LAYERS):
            x = self._layer(x, bias, f"layers.{index}")
        x = self._drop(self._mean(x, mask), 0.2)
        head = [self.weight("head.weight", len(KINDS), WIDTH), self.weight("head.bias", len(KINDS))]
        self.add("Gemm", [x, *head], "logits", transB=1)

    def _embedding(self, vocabulary: int, mask: str) -> str:
        """What a token is plus what its position is."""
        token = self.add("Gather", [self.weight("token.weight", vocabulary, WIDTH), self._words(mask)], "token")
        second = self.add("Shape", ["input_ids"], "lengths", start=1, end=2)
        numbers = [
            self.constant("start", np.array(0, np.int64)),
            self.add("Squeeze", [second], "length"),
            self.constant("step", np.array(1, np.int64)),
        ]
        positions = self.add("Range", numbers, "positions")
        position = self.add("Gather", [self.weight("position.weight", LENGTH, WIDTH), positions], "position")
        return self.add("Add", [token, position], "embedding")

    def _words(self, mask: str) -> str:
        """The tokens; with noise, one in ten is [unk]."""
        if not self.noise:
            return "input_ids"
        known = self.add("Cast", [self._drop(mask, 0.1)], "known", to=onnx.TensorProto.BOOL)
        return self.add("Where", [known, "input_ids", self.constant("unknown", np.array(1, np.int64))], "words")

    def _bias(self, mask: str) -> str:
        """0 for a token, -1e4 for padding: what scores of attention are added to."""
        rows = self.constant("heads_and_queries", np.array([1, 2], np.int64))
        absent = self.add("Sub", [self.add("Unsqueeze", [mask, rows], "keys"), self.one], "absent")
        return self.add("Mul", [absent, self.constant("far", np.array(1e4, np.float32))], "bias")

    def _layer(self, x: str, bias: str, name: str) -> str:
        """Self-attention and a Gelu network, each with a residual and LayerNormalization behind it (as in BERT)."""
        y = self._drop(self._linear(self._attention(x, bias, name), f"{name}.out"), 0.1)
        x = self._norm(self.add("Add", [x, y], f"{name}.residual1"), f"{name}.norm1")
        y = self._gelu(self._linear(x, f"{name}.up", WIDTH, 4 * WIDTH))
        y = self._drop(self._linear(y, f"{name}.down", 4 * WIDTH, WIDTH), 0.1)
        return self._norm(self.add("Add", [x, y], f"{name}.residual2"), f"{name}.norm2")

    def _attention(self, x: str, bias: str, name: str) -> str:
        """softmax(q k^T / sqrt(width of a head) + bias) v for each head (Vaswani et al., 2017)."""
        query = self._heads(self._linear(x, f"{name}.query"), [0, 2, 1, 3])
        key = self._heads(self._linear(x, f"{name}.key"), [0, 2, 3, 1])
        value = self._heads(self._linear(x, f"{name}.value"), [0, 2, 1, 3])
        root = self.constant("root", np.array((WIDTH // HEADS) ** 0.5, np.float32))
        scores = self.add("Div", [self.add("MatMul", [query, key], f"{name}.products"), root], f"{name}.scaled")
        scores = self.add("Add", [scores, bias], f"{name}.scores")
        weights = self.add("Softmax", [scores], f"{name}.attention", axis=-1)
        mixed = self.add("MatMul", [weights, value], f"{name}.mixed")
        mixed = self.add("Transpose", [mixed], f"{name}.tokens", perm=[0, 2, 1, 3])
        joined = self.constant("joined", np.array([0, 0, WIDTH], np.int64))
        return self.add("Reshape", [mixed, joined], f"{name}.joined")

    def _heads(self, x: str, perm: list[int]) -> str:
        """[batch, tokens, width] as [batch, tokens, heads, width of a head], its axes in the order `perm`."""
        split = self.constant("split", np.array([0, 0, HEADS, WIDTH // HEADS], np.int64))
        return self.add("Transpose", [self.add("Reshape", [x, split], f"{x}.split")], f"{x}.heads", perm=perm)

    def _gelu(self, x: str) -> str:
        """x (1 + erf(x / sqrt 2)) / 2, written out: Gelu is an operator from opset 20 on."""
        root = self.constant("root_of_two", np.array(2**0.5, np.float32))
        gate = self.add("Erf", [self.add("Div", [x, root], f"{x}.scaled")], f"{x}.erf")
        gate = self.add("Add", [gate, self.one], f"{x}.shifted")
        gate = self.add("Mul", [gate, self.constant("half", np.array(0.5, np.float32))], f"{x}.gate")
        return self.add("Mul", [x, gate], f"{x}.gelu")

    def _mean(self, x: str, mask: str) -> str:
        """The mean over the tokens of a text."""
        tokens, features = (
            self.constant(name, np.array([axis], np.int64)) for axis, name in ((1, "tokens"), (2, "features"))
        )
        real = self.add("Mul", [x, self.add("Unsqueeze", [mask, features], "real")], "real_tokens")
        sums = self.add("ReduceSum", [real, tokens], "sums", keepdims=0)
        return self.add("Div", [sums, self.add("ReduceSum", [mask, tokens], "counts", keepdims=1)], "mean")

    def _linear(self, x: str, name: str, inputs: int = WIDTH, outputs: int = WIDTH) -> str:
        product = self.add("MatMul", [x, self.weight(f"{name}.weight", inputs, outputs)], f"{name}.product")
        return self.add("Add", [product, self.weight(f"{name}.bias", outputs)], name)

    def _norm(self, x: str, name: str) -> str:
        weights = [self.weight(f"{name}.{part}", WIDTH) for part in ("scale", "bias")]
        return self.add("LayerNormalization", [x, *weights], name)

    def _drop(self, x: str, ratio: float) -> str:
        """Dropout, where there is noise; each draws from a seed of its own."""
        if not self.noise:
            return x
        given = [self.constant(f"ratio_{ratio}", np.array(ratio, np.float32)), self.constant("on", np.array(True))]
        return self.add("Dropout", [x, *given], f"{x}.dropped", seed=len(self.nodes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=pathlib.Path, help="folder of WordNet's data.noun: make the data again")
    wordnet = parser.parse_args().wordnet
    if wordnet:
        make_data(wordnet)
    data = {name: dict(np.load(HERE / f"{name}.npz")) for name in ("train", "eval")}
    vocabulary = len((HERE / "vocabulary.txt").read_text().splitlines())
    weights = common.train(Network(vocabulary, noise=True).to_onnx(), data["train"], SETTINGS, SMOOTHING)
    common.save(Network(vocabulary, noise=False).to_onnx(weights), HERE / "model.onnx")
    common.card(HERE, data["eval"], licence="WordNet 3.0 noun glosses, WordNet licence", labels=KINDS)


if __name__ == "__main__":
    main()
