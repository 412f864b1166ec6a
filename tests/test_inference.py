import pickle
import re
import shutil

import apache_beam as beam
import numpy as np
import pytest
import torch
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline as Pipeline
from apache_beam.testing.util import assert_that
from apache_beam.transforms.window import FixedWindows, GlobalWindows, IntervalWindow, TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from tokenized_texts import TEXTS, tokenized_documents

from transforms import inference
from transforms.encoder import BertLstmEncoder
from transforms.inference import EmbedDocuments, EncodeDocuments, EncoderModelHandler
from transforms.loaded_encoder import (
    Encoded,
    LoadedEncoder,
)
from transforms.schema import Document, content_hash
from transforms.weights import load_tokenizer


@pytest.fixture
def loaded(tiny_encoder) -> LoadedEncoder:
    return LoadedEncoder(tiny_encoder, max_batch_tokens=2048)


def test_the_handler_loads_and_survives_pickling(tiny_checkpoint):
    handler = pickle.loads(pickle.dumps(EncoderModelHandler(tiny_checkpoint, device="cpu", dtype="float32")))
    loaded = handler.load_model()
    assert loaded.fingerprint == BertLstmEncoder.from_pretrained(tiny_checkpoint).fingerprint()
    documents = tokenized_documents(loaded.encoder, TEXTS)
    assert [type(result) for result in handler.run_inference(documents, loaded)] == [Encoded] * len(TEXTS)
    assert handler.get_num_bytes(documents) == 4 * sum(len(document.token_ids) for document in documents)


def test_another_checkpoint_on_a_worker_is_refused(tiny_checkpoint):
    handler = EncoderModelHandler(tiny_checkpoint, dtype="float32", expected_fingerprint="0" * 64)
    with pytest.raises(RuntimeError, match="the job was started with 0000"):
        handler.load_model()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_is_refused_where_there_is_none(tiny_checkpoint):
    with pytest.raises(RuntimeError, match=r"cuda was asked for, but .* has no usable GPU"):
        EncoderModelHandler(tiny_checkpoint, device="cuda").load_model()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device 'tpu' is none of auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype 'int8' is none of auto, float32, bfloat16, float16"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1, not 0"),
        ({"max_tokens": -1}, "max_tokens must be at least 1, not -1"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        EncoderModelHandler(**arguments)


def test_inference_arguments_are_refused(loaded):
    with pytest.raises(ValueError, match="takes no inference_args"):
        EncoderModelHandler().run_inference([], loaded, {"temperature": 1})


def test_large_fields_make_a_batch_smaller(loaded):
    [document] = tokenized_documents(loaded.encoder, ["zip file"])
    size = EncoderModelHandler().batch_elements_kwargs()["element_size_fn"]
    assert size(document) == 4
    assert size(document._replace(fields_bytes=256_000)) == 1004


# In a pipeline.


def run_pipeline() -> Pipeline:
    return Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))


def test_run_inference_gives_one_result_for_each_document(tiny_checkpoint, loaded):
    documents = tokenized_documents(loaded.encoder, TEXTS * 20)
    handler = EncoderModelHandler(tiny_checkpoint, device="cpu", dtype="float32", batch_tokens=200)
    with run_pipeline() as pipeline:
        encoded = pipeline | beam.Create(documents) | RunInference(handler) | beam.Map(lambda one: one.content_hash)

        def check(hashes):
            assert sorted(hashes) == sorted(document.content_hash for document in documents)

        assert_that(encoded, check)


def test_embed_documents_embeds_or_rejects_each_document_once(tiny_checkpoint):
    expected = BertLstmEncoder.from_pretrained(tiny_checkpoint).encode(TEXTS)
    documents = [Document(str(place), text, "made", place, {"year": 2000 + place}) for place, text in enumerate(TEXTS)]
    unusable = [
        Document("none", None, "made", 90),
        Document("number", 5, "made", 91),
        Document("surrogate", "a \ud800", "made", 92),
        Document("id \ud800", "zip", "made", 93),
        Document("field", "zip", "made", 94, {"tags": ["a", {"b": "\ud800"}]}),
    ]
    with run_pipeline() as pipeline:
        embeddings, rejected = (
            pipeline
            | beam.Create([*documents, *unusable])
            | EmbedDocuments(checkpoint=tiny_checkpoint, device="cpu", dtype="float32")
        )

        def check_embeddings(rows):
            rows = sorted(rows, key=lambda row: int(row.id))
            kept = [place for place, text in enumerate(TEXTS) if text]
            assert [(row.id, row.fields) for row in rows] == [(str(k), {"year": 2000 + k}) for k in kept]
            assert [row.content_hash for row in rows] == [content_hash(TEXTS[k]) for k in kept]
            np.testing.assert_allclose([row.embedding for row in rows], expected[kept], atol=1e-5)

        def check_rejected(rows):
            assert sorted((row.id, row.reason, row.source, row.position) for row in rows) == [
                ("5", "empty_text", "made", 5),
                ("field", "invalid_utf8", "made", 94),
                ("id ?", "invalid_utf8", "made", 93),
                ("none", "missing_text", "made", 90),
                ("number", "wrong_type", "made", 91),
                ("surrogate", "invalid_utf8", "made", 92),
            ]

        assert_that(embeddings, check_embeddings, label="embeddings")
        assert_that(rejected, check_rejected, label="rejected")


def test_in_windows_each_embedding_stays_in_its_documents(tiny_checkpoint):
    """Here an empty text, rejected, is in each window too."""
    texts = ["zip", "", "archive", "file", "", "words", "text", ""]
    documents = [Document(str(place), text, "made", place) for place, text in enumerate(texts)]
    with run_pipeline() as pipeline:
        embeddings, rejected = (
            pipeline
            | beam.Create(documents)
            | beam.Map(lambda one: TimestampedValue(one, one.position // 3 * 10)).with_output_types(Document)
            | beam.WindowInto(FixedWindows(10))
            | EmbedDocuments(checkpoint=tiny_checkpoint, device="cpu", dtype="float32")
        )
        found = {
            "embeddings": embeddings
            | "of rows" >> beam.Map(lambda row, window=beam.DoFn.WindowParam: (row.id, window)),
            "rejected": rejected | "of records" >> beam.Map(lambda row, window=beam.DoFn.WindowParam: (row.id, window)),
        }

        def check(places):
            def check_windows(rows):
                expected = [(str(place), IntervalWindow(place // 3 * 10, place // 3 * 10 + 10)) for place in places]
                assert sorted(rows) == expected

            return check_windows

        for name, rows in found.items():
            places = [place for place, text in enumerate(texts) if bool(text) == (name == "embeddings")]
            globally = rows | f"{name} globally" >> beam.WindowInto(GlobalWindows())
            assert_that(globally, check(places), label=name)


def test_tokenized_documents_travel_in_chunks_of_one_time_and_window(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(inference, "_TOKENIZED_TEXTS", 7)
    monkeypatch.setattr(inference, "_CHUNK_TEXTS", 3)
    monkeypatch.setattr(inference, "_CHUNK_TOKENS", 20)
    step = inference._Tokenize(tiny_checkpoint, None, None)
    step.setup()
    texts = ["a", "a a", "", "a a a", "a", "a " * 17, "a " * 40, "a", "a a", "a", "a", "a", "a", "a", "a"]
    times = [1] * 11 + [2] * 2 + [1] * 2
    documents = [Document(str(place), text, "made", place) for place, text in enumerate(texts)]
    for _ in range(2):  # One bundle after the other.
        outputs = []
        step.start_bundle()
        for document, time in zip(documents, times, strict=True):
            outputs += list(step.process(document, Timestamp(time), IntervalWindow(0, 10)))
            assert len(outputs) == 0 or document.position >= 6
        outputs += list(step.finish_bundle())
        failed = [output.value for output in outputs if isinstance(output, beam.pvalue.TaggedOutput)]
        assert [(one.value.document.id, one.value.reason, one.timestamp) for one in failed] == [
            ("2", "empty_text", Timestamp(1))
        ]
        chunks = [output for output in outputs if not isinstance(output, beam.pvalue.TaggedOutput)]
        unpacked = [list(inference._unpack(chunk.value)) for chunk in chunks]
        assert [[(one.document.position, len(one.token_ids)) for one in chunk] for chunk in unpacked] == [
            [(0, 1), (1, 2), (3, 3)],
            [(4, 1)],
            [(5, 17)],
            [(6, 40)],
            [(7, 1), (8, 2), (9, 1)],
            [(10, 1)],
            [(11, 1), (12, 1)],
            [(13, 1)],
            [(14, 1)],
        ]
        assert [chunk.timestamp for chunk in chunks] == [Timestamp(time) for time in (1, 1, 1, 1, 1, 1, 2, 1, 1)]
        assert {chunk.windows for chunk in chunks} == {(IntervalWindow(0, 10),)}
        assert [one.content_hash for chunk in unpacked for one in chunk] == [
            content_hash(text) for text in texts if text
        ]


def test_documents_with_large_fields_travel_alone_and_do_not_wait_for_many(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(inference, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(inference, "_TOKENIZED_BYTES", 4000)
    step = inference._Tokenize(tiny_checkpoint, None, None)
    step.setup()
    step.start_bundle()
    sizes = [10, 10, 3000, 10, 2000, 400, 400, 400]
    outputs = []
    for place, size in enumerate(sizes):
        document = Document(str(place), "zip", "made", place, {"kept": b"x" * size})
        outputs.append(list(step.process(document, Timestamp(1), IntervalWindow(0, 10))))
    outputs.append(list(step.finish_bundle()))
    [whole] = [
        one
        for chunks in outputs
        for chunk in chunks
        for one in inference._unpack(chunk.value)
        if one.document.position == 2
    ]
    assert 3000 < whole.fields_bytes < 3100
    assert [
        [[one.document.position for one in inference._unpack(chunk.value)] for chunk in chunks] for chunks in outputs
    ] == [[], [], [], [], [[0, 1], [2], [3], [4]], [], [], [], [[5, 6], [7]]]


def test_a_bundle_that_failed_leaves_no_document_to_the_next(tiny_checkpoint):
    step = inference._Tokenize(tiny_checkpoint, None, None)
    step.setup()
    for text in ("zip", "file"):
        step.start_bundle()
        assert list(step.process(Document(text, text), Timestamp(1), IntervalWindow(0, 10))) == []
    [chunk] = step.finish_bundle()
    assert [one.document.id for one in inference._unpack(chunk.value)] == ["file"]


@pytest.mark.parametrize("other", ["vocabulary", "max_tokens"])
def test_another_tokenizer_on_a_worker_is_refused(tiny_checkpoint, tmp_path, other):
    expected = load_tokenizer(tiny_checkpoint)
    checkpoint = tmp_path / "on the worker"
    shutil.copytree(tiny_checkpoint, checkpoint)
    path = checkpoint / ("config.json" if other == "max_tokens" else "bert/tokenizer.json")
    text = path.read_text()
    swapped = re.sub(r'("max_tokens": )\d+', r"\g<1>9", text) if other == "max_tokens" else text.replace("zip", "zap")
    assert swapped != text
    path.write_text(swapped)
    handler = EncoderModelHandler(str(checkpoint), expected_tokenizer=(expected.sha256(), expected.max_tokens))
    with (
        pytest.raises(RuntimeError, match=r"on the worker' on this worker has the tokenizer .*the same release"),
        run_pipeline() as pipeline,
    ):
        pipeline | beam.Create([Document("1", "zip")]) | EncodeDocuments(handler, str(checkpoint))
