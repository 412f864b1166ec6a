"""Texts of all sorts, tokenized for the encoder."""

from transforms.encoder import BertLstmEncoder
from transforms.loaded_encoder import TokenizedDocument
from transforms.schema import Document, content_hash

TEXTS = ["read the zip archive", "a", "the lines of a file. " * 60, "fast", "slow blue", "", "green " * 30]


def tokenized_documents(encoder: BertLstmEncoder, texts: list[str]) -> list[TokenizedDocument]:
    return [
        TokenizedDocument(Document(str(place), text), content_hash(text), tokenized.token_ids, tokenized.truncated)
        for place, (text, tokenized) in enumerate(zip(texts, encoder.tokenizer.tokenize(texts), strict=True))
    ]
