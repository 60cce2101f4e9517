"""What importance resampling has to beat, beside chance: BM25, and the distance of sentence embeddings."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doremi_train.config import UserError
from doremi_train.methods import ngram
from doremi_train.selection import kernels
from doremi_train.selection.parts import Batch
from doremi_train.selection.scorers import Arrays, Random, Targets, whole

BUCKETS = 2**18  # of words for BM25: hardly two words of a text share one
SATURATION, LENGTH = 1.5, 0.75  # k₁ and b
TEXTS = 32  # embedded together
SEEN = 256  # tokens of a text that an encoder reads


class BM25(Random):
    """Lucene's BM25 of the target's documents as queries, the mean over them; words in hash buckets."""

    def sums(self) -> Arrays:
        return {"documents": np.zeros(BUCKETS, np.int64), "parts": np.array(0), "tokens": np.array(0)}

    def observe(self, batch: Batch, sums: Arrays) -> None:
        kernels.frequencies(batch.tokens.hashes, batch.bounds, np.zeros(BUCKETS, np.int64), sums["documents"])
        sums["parts"] += len(batch.start)
        sums["tokens"] += len(batch.tokens.hashes)

    def fit(self, targets: Targets, sums: Arrays) -> Arrays:
        rare = np.log1p((sums["parts"] - sums["documents"] + 0.5) / (sums["documents"] + 0.5))
        weights = []
        for documents in targets.values():
            hashes = whole(documents).tokens.hashes
            buckets = (ngram.mixed(hashes) >> np.uint64(32)) * np.uint64(BUCKETS) >> np.uint64(32)  # as kernels.bucket
            weights.append(rare * np.bincount(buckets.astype(np.int64), minlength=BUCKETS) / len(documents))
        mean = sums["tokens"] / max(int(sums["parts"]), 1)
        return {"weights": np.stack(weights, 1), "mean": np.array(max(mean, 1.0))}

    def score(self, batch: Batch, model: Arrays) -> NDArray[np.float64]:
        found = np.zeros((len(batch.start), model["weights"].shape[1]))
        room = np.zeros(BUCKETS, np.int64)
        kernels.bm25(
            batch.tokens.hashes, batch.bounds, model["weights"], SATURATION, LENGTH, float(model["mean"]), room, found
        )  # fmt: skip
        return found


class Embedding(Random):
    """Cosine between a part's embedding and the mean of the target's, by a local sentence encoder."""

    def fit(self, targets: Targets, sums: Arrays) -> Arrays:
        centres = [self._embed(documents).mean(0) for documents in targets.values()]
        return {"centres": np.stack([centre / np.linalg.norm(centre) for centre in centres])}  # (C, D)

    def score(self, batch: Batch, model: Arrays) -> NDArray[np.float64]:
        if batch.text is None:
            raise UserError("selection.method=embedding: these files hold tokens, not text; take another method")
        return self._embed([batch.part(p) for p in range(len(batch.start))]) @ model["centres"].T

    def _embed(self, texts: list[bytes]) -> NDArray[np.float64]:
        """(N, D) unit vectors: the mean of the last layer over the tokens."""
        import torch

        tokenizer, encoder = _encoder(str(self.options.encoder))
        found = []
        for first in range(0, len(texts), TEXTS):
            some = [text.decode() for text in texts[first : first + TEXTS]]
            tokens = tokenizer(some, padding=True, truncation=True, max_length=SEEN, return_tensors="pt")
            with torch.inference_mode():
                hidden = encoder(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
            found.append(torch.nn.functional.normalize(mean.double(), dim=1).numpy())
        return np.concatenate(found)


@lru_cache(1)
def _encoder(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        how = {"local_files_only": True, "trust_remote_code": False}
        return AutoTokenizer.from_pretrained(folder, **how), AutoModel.from_pretrained(
            folder, use_safetensors=True, **how
        ).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"selection.encoder={folder}: not a local folder of a sentence encoder ({str(error).splitlines()[0]})"
        ) from None
