import argparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pipeline import evaluate
from pipeline.__main__ import main
from pipeline.evaluate import halves_found, mean_pooled, ndcg, retrieval_ndcg, spearman, sts_spearman
from pipeline.training_data import StsPairs, read_sts

TOPICS = ["red", "green", "blue", "fast", "slow"]


def by_topic(texts) -> np.ndarray:
    """An encoder that counts the words of TOPICS."""
    counts = np.array([[text.split().count(topic) for topic in TOPICS] for text in texts], dtype=np.float32)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def test_spearman_equals_one_computed_by_hand():
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: deviations -1.5, 0, 0, 1.5 and -0.5, -1.5, 0.5, 1.5, so 3 / sqrt(4.5 * 5).
    assert spearman(np.array([10, 20, 20, 30]), np.array([5, 1, 7, 9])) == pytest.approx(3 / np.sqrt(4.5 * 5))


def test_spearman_depends_on_the_order_alone():
    values = np.random.default_rng(0).normal(size=50)
    assert spearman(values, np.exp(values)) == pytest.approx(1)
    assert spearman(values, -(values**3)) == pytest.approx(-1)


def test_sts_spearman_ranks_the_cosines():
    pairs = StsPairs(["red", "red", "red"], ["red", "red blue", "blue"], np.array([5.0, 3.0, 0.5]))
    assert sts_spearman(by_topic, pairs) == pytest.approx(100)
    assert sts_spearman(by_topic, pairs._replace(scores=np.array([0.0, 1.0, 2.0]))) == pytest.approx(-100)


def test_ndcg_equals_one_computed_by_hand():
    # (1 / log2(3) + 2 / log2(4)) / (2 / log2(2) + 1 / log2(3))
    assert ndcg([0, 1, 2], [1, 2]) == pytest.approx((1 / np.log2(3) + 1) / (2 + 1 / np.log2(3)))
    assert ndcg([2, 1, 0], [1, 2]) == 1
    assert ndcg([0, 0], [1]) == 0


@pytest.fixture
def retrieval_folder(tmp_path):
    corpus = {"doc_id": ["a", "b", "c"], "title": ["red", "", "blue"], "text": ["red green", "green", "slow"]}
    pq.write_table(pa.table(corpus), tmp_path / "corpus.parquet")
    pq.write_table(pa.table({"query_id": ["1", "2"], "text": ["red", "slow"]}), tmp_path / "queries.parquet")
    (tmp_path / "qrels.tsv").write_text("query_id\tdoc_id\trelevance\n1\ta\t1\n2\tb\t1\n", encoding="utf-8")
    return tmp_path


def test_retrieval_ranks_the_corpus(retrieval_folder):
    # Query 1 finds its document first; query 2 finds c, then a and b, which tie, in their order: b is third.
    for folder in (str(retrieval_folder), f"{retrieval_folder}/"):
        assert retrieval_ndcg(by_topic, folder) == pytest.approx(100 * (1 + 1 / np.log2(4)) / 2)


def test_halves_of_a_document_are_looked_for_among_all_halves():
    documents = [f"{topic} {topic} {topic} {topic}" for topic in TOPICS]
    assert halves_found(by_topic, documents) == 1
    assert halves_found(by_topic, ["red red blue blue", "blue blue red red"]) == 0


def test_mean_pooling_is_the_mean_over_the_first_window(tiny_encoder):
    texts = ["read the zip", "words " * 100, ""]
    expected = []
    for text in texts:
        ids = tiny_encoder.tokenizer.tokenize([text])[0].token_ids[: tiny_encoder.tokenizer.window_tokens - 2]
        (window,) = tiny_encoder.tokenizer.windows(ids)
        with torch.no_grad():
            states = tiny_encoder.bert(torch.from_numpy(window)[None]).last_hidden_state[0]
        expected.append(nn.functional.normalize(states.mean(dim=0), dim=0).numpy())
    np.testing.assert_allclose(mean_pooled(tiny_encoder, texts), np.stack(expected), atol=1e-5)


def parsed(options: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(options)


@pytest.fixture
def sts_file(tmp_path) -> str:
    columns = {
        "split": ["dev"] * 4 + ["test"] * 2,
        "score": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        "sentence1": ["read", "write", "zip file", "red", "blue", "fast"],
        "sentence2": ["words", "write a file", "zip", "red", "green", "slow"],
    }
    pq.write_table(pa.table(columns), tmp_path / "sts.parquet")
    return str(tmp_path / "sts.parquet")


def test_the_command_prints_each_measure_of_each_encoder(sts_file, retrieval_folder, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "documents.txt").write_text("\n".join(f"{topic} " * 60 for topic in TOPICS), encoding="utf-8")
    options = ["--checkpoint", tiny_checkpoint, "--sts", sts_file, "--retrieval", str(retrieval_folder)]
    options += ["--documents", str(tmp_path / "documents.txt"), "--max_documents", "3", "--baselines"]
    assert evaluate.run(parsed([*options, "--dtype", "float32"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    for name in (tiny_checkpoint, "BERT, mean of tokens", "untrained head"):
        assert sum(line.startswith(f"{name}: ") for line in lines) == 3
    assert sum("STS dev, Spearman x 100: " in line for line in lines) == 3
    assert sum("3 documents, other half found: " in line for line in lines) == 3


def test_nothing_to_measure_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate"])
    assert caught.value.code == 2
    assert "error: nothing to measure: give --sts, --retrieval or --documents" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["none.parquet", "none.jsonl"])
def test_a_file_that_is_not_there_is_told_in_words(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"^there is no file {tmp_path}/{name}$"):
        read_sts(f"{tmp_path}/{name}", "dev")


def test_a_split_that_is_not_there_is_refused(sts_file):
    assert len(read_sts(sts_file, "test").first) == 2
    with pytest.raises(ValueError, match=r"0 pairs in split 'train': its splits are \['dev', 'test'\]"):
        read_sts(sts_file, "train")
