"""What importance resampling has to beat, beside chance: BM25, a linear classifier, the distance of
embeddings."""

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # each part is imported when it is first used
from numpy.typing import NDArray

from doremi_train.config import UserError, judged
from doremi_train.methods import ngram
from doremi_train.selection.documents import kernels
from doremi_train.selection.documents.parts import Batch, Document, batch
from doremi_train.selection.documents.scorers import NO_TEXT, Arrays, NGrams, Random, Targets, whole

BUCKETS = 2**18  # of words for BM25: hardly two words of a text share one
SATURATION, LENGTH = 1.5, 0.75  # k₁ and b
# Parts of the corpus that a classifier tells from the target, and tokens of each.
SAMPLE, READ = 2048, 128
PENALTY = 1e-6  # of its squared weights
TEXTS = 32  # embedded together
SEEN = 256  # tokens of a text that an encoder reads


class BM25(Random):
    """Lucene's BM25 of the target's documents as queries, the mean over them; words in hash
    buckets."""

    def sums(self) -> Arrays:
        return {
            "documents": np.zeros(BUCKETS, np.int64),
            "parts": np.array(0),
            "tokens": np.array(0),
        }

    def observe(self, batch: Batch, sums: Arrays) -> None:
        kernels.frequencies(
            batch.tokens.hashes, batch.bounds, np.zeros(BUCKETS, np.int64), sums["documents"]
        )
        sums["parts"] += len(batch.start)
        sums["tokens"] += len(batch.tokens.hashes)

    def fit(self, targets: Targets, sums: Arrays) -> Arrays:
        rare = np.log1p((sums["parts"] - sums["documents"] + 0.5) / (sums["documents"] + 0.5))
        weights = []
        for documents in targets.values():
            hashes = whole(documents).tokens.hashes
            buckets = _buckets(ngram.mixed(hashes), BUCKETS)
            weights.append(rare * np.bincount(buckets, minlength=BUCKETS) / len(documents))
        mean = sums["tokens"] / max(int(sums["parts"]), 1)
        return {"weights": np.stack(weights, 1), "mean": np.array(max(mean, 1.0))}

    def score(self, batch: Batch, model: Arrays) -> NDArray[np.float64]:
        scores = np.zeros((len(batch.start), model["weights"].shape[1]))
        room = np.zeros(BUCKETS, np.int64)
        kernels.bm25(
            batch.tokens.hashes,
            batch.bounds,
            model["weights"],
            SATURATION,
            LENGTH,
            float(model["mean"]),
            room,
            scores,
        )
        return scores


class Classifier(NGrams):
    """A linear classifier over the mean of hashed 1- and 2-grams, as fastText has them: logistic
    regression of the target's text against a sample of the corpus, where both sides weigh the
    same."""

    def sums(self) -> Arrays:
        """The parts with the smallest keys: as good as random, and the same however the corpus is
        divided."""
        return {"key": np.empty(0, np.uint64), "sample": np.empty((0, READ), np.uint64)}

    def observe(self, batch: Batch, sums: Arrays) -> None:
        hashes, bounds = self.features(batch)
        ids = np.empty(len(bounds) - 1, np.uint64)
        kernels.identify(hashes, bounds, ids)
        key = ngram.mixed(ids)
        full = len(sums["key"]) == SAMPLE
        few = np.flatnonzero((np.diff(bounds) > 0) & ((key < sums["key"][-1]) if full else True))
        few = few[np.argsort(key[few], kind="stable")[:SAMPLE]]
        sample = np.zeros((len(few), READ), np.uint64)
        for row, part in zip(sample, few, strict=True):
            tokens = hashes[bounds[part] : bounds[part + 1]][:READ]
            row[: len(tokens)] = tokens
        sums |= self.together(sums, {"key": key[few], "sample": sample})

    def together(self, first: Arrays, second: Arrays) -> Arrays:
        key, at = np.unique(np.concatenate([first["key"], second["key"]]), return_index=True)
        sample = np.concatenate([first["sample"], second["sample"]])
        return {"key": key[:SAMPLE], "sample": sample[at[:SAMPLE]]}

    def fit(self, targets: Targets, sums: Arrays) -> Arrays:
        if not len(sums["sample"]):
            raise UserError(NO_TEXT)
        corpus = self._mean_grams([row[row != 0] for row in sums["sample"]])
        tables = []
        for documents in targets.values():
            parts = batch([Document(row, 0, "", text) for row, text in enumerate(documents)], READ)
            served = [parts.tokens.hashes[a:b] for a, b in itertools.pairwise(parts.bounds)]
            tables.append(_logistic(self._mean_grams(served), corpus))
        return {"table": np.stack(tables, 1).astype(np.float32)}

    def _mean_grams(self, texts: list[NDArray[np.uint64]]) -> Any:
        """(N, m) sparse, of token hashes: rows that sum to 1, as `NGrams.score` sees a part."""
        grams = [
            np.concatenate([ngram.mixed(t), ngram.mixed(ngram.mixed(t[:-1]) + t[1:])])
            for t in texts
            if len(t)
        ]
        column = np.concatenate([_buckets(part, self.options.m) for part in grams])
        rows = np.repeat(np.arange(len(grams)), [len(part) for part in grams])
        value = np.repeat([1 / len(part) for part in grams], [len(part) for part in grams])
        return scipy.sparse.csr_matrix((value, (rows, column)), (len(grams), self.options.m))


def _logistic(positive: Any, negative: Any) -> NDArray[np.float64]:
    """(m,) weights, the offset added to each: rows (N, m) sum to 1."""
    x = scipy.sparse.vstack([positive, negative]).tocsr()
    side = np.repeat([1.0, -1.0], [positive.shape[0], negative.shape[0]])
    weight = np.where(side > 0, 0.5 / positive.shape[0], 0.5 / max(negative.shape[0], 1))

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w, offset = parameters[:-1], parameters[-1]
        margin = side * (x @ w + offset)
        slope = -weight * side / (1 + np.exp(np.minimum(margin, 500)))
        value = (weight * np.logaddexp(0, -margin)).sum() + PENALTY / 2 * (w @ w)
        return float(value), np.append(x.T @ slope + PENALTY * w, slope.sum())

    parameters = scipy.optimize.minimize(
        loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}
    ).x
    return parameters[:-1] + parameters[-1]


def _buckets(mixed: NDArray[np.uint64], buckets: int) -> NDArray[np.int64]:
    """`kernels.bucket` of mixed hashes (N,)."""
    return ((mixed >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


class Embedding(Random):
    """Cosine between a part's embedding and the mean of the target's, by a local sentence
    encoder."""

    def fit(self, targets: Targets, sums: Arrays) -> Arrays:
        encoder = str(self.options.encoder)
        centres = [embedded(documents, encoder).mean(0) for documents in targets.values()]
        # (C, D)
        return {"centres": np.stack([centre / np.linalg.norm(centre) for centre in centres])}

    def score(self, batch: Batch, model: Arrays) -> NDArray[np.float64]:
        if batch.text is None:
            raise UserError(
                "selection.method=embedding: these files hold tokens, not text; take another method"
            )
        texts = [batch.part(p) for p in range(len(batch.start))]
        return embedded(texts, str(self.options.encoder)) @ model["centres"].T


def embedded(
    texts: list[bytes], encoder: str, key: str = "selection.encoder", together: int = TEXTS
) -> NDArray[np.float64]:
    """(N, D) unit vectors: the mean of the last layer over the tokens. `together` of them share a
    pass, whose padding changes their last bits; messages name the `key` that gave the encoder."""
    import torch

    tokenizer, model = _encoder(encoder, key)
    embeddings = [np.empty((0, model.config.hidden_size))]
    for first in range(0, len(texts), together):
        some = [text.decode(errors="ignore") for text in texts[first : first + together]]
        tokens = tokenizer(
            some, padding=True, truncation=True, max_length=SEEN, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        embeddings.append(torch.nn.functional.normalize(mean.double(), dim=1).numpy())
    return np.concatenate(embeddings)


def files_of_encoder(folder: str) -> list[list[Any]]:
    """What changes with the files of an encoder."""
    return [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(Path(folder).glob("*"))
    ]


@lru_cache(1)
def _encoder(folder: str, key: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    remedy = "it is not a local folder of a sentence encoder; give one in safetensors"
    with judged(f"{key}={folder}", remedy):
        how = {"local_files_only": True, "trust_remote_code": False}
        return AutoTokenizer.from_pretrained(folder, **how), AutoModel.from_pretrained(
            folder, use_safetensors=True, **how
        ).eval()
