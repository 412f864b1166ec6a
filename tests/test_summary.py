"""The table that ends a run."""

from pipeline.summary import summary

MANIFEST = {
    "snapshot": "20261122T180000Z",
    "seconds": 83.46,
    "seconds_saved": 1234.5,
    "encoder": {"device": "cpu", "dtype": "float32", "checkpoint": "default"},
    "counts": {
        "read": 1_234_567,
        "embedded": 1000,
        "reused": 1_233_564,
        "recovered": 20,
        "rejected": 3,
        "deleted": 7,
        "truncated": 2,
        "tokens": 50_000,
        "padded_tokens": 51_000,
    },
    "rejected_by_reason": {"empty_text": 2, "invalid_utf8": 1},
    "rejected_files": [{"file": "rejected-00000-of-00001.jsonl"}],
}
FOLDER = "gs://bucket/out/snapshot=20261122T180000Z"


def test_a_published_snapshots_summary():
    assert (
        summary(FOLDER, MANIFEST)
        == """
published  snapshot=20261122T180000Z

  records read               1,234,567
  embedded                       1,000
  reused                     1,233,564
    of a crashed run                20
  deleted                            7
  truncated                          2
  tokens encoded                50,000
  rejected                           3
    empty_text                       2
    invalid_utf8                     1
  padding ratio                  1.020
  encoder ran on                   cpu, float32
  seconds                         83.5
  seconds saved                1,234.5

  in gs://bucket/out/snapshot=20261122T180000Z

  open it with
    duckdb -c "SELECT * FROM 'gs://bucket/out/snapshot=20261122T180000Z/*.parquet' LIMIT 5"
    python -c "import polars; print(polars.read_parquet('gs://bucket/out/snapshot=20261122T180000Z/*.parquet'))"
    ./launch.sh search "what you look for" --output gs://bucket/out
  the rejected records are in gs://bucket/out/snapshot=20261122T180000Z/rejected-*.jsonl"""
    )


def test_what_searches_needs_the_checkpoint_that_embedded():
    text = summary(FOLDER, MANIFEST | {"encoder": MANIFEST["encoder"] | {"checkpoint": "gs://bucket/mine"}})
    assert '"what you look for" --output gs://bucket/out --checkpoint gs://bucket/mine\n' in text


def test_a_run_that_was_not_published_says_why_and_where_its_rejected_records_are():
    text = summary(FOLDER, MANIFEST | {"not_published": ["the counts disagree: so and so", "too much was rejected"]})
    assert text.splitlines()[1] == "NOT published  snapshot=20261122T180000Z"
    assert text.splitlines()[-5:] == [
        "  in gs://bucket/out/snapshot=20261122T180000Z",
        "",
        "  because the counts disagree: so and so",
        "  because too much was rejected",
        "  the rejected records are in gs://bucket/out/snapshot=20261122T180000Z/rejected-*.jsonl",
    ]
    assert "open it with" not in text


def test_counts_are_shown_where_they_are_zero_and_what_did_not_happen_is_left_out():
    counts = MANIFEST["counts"] | {"recovered": 0, "rejected": 0, "tokens": 0, "padded_tokens": 0}
    empty = {"rejected_by_reason": {}, "rejected_files": [], "seconds_saved": 0.0}
    for extra in ({}, {"not_published": ["the input holds no record at all"]}):
        text = summary("output/snapshot=20261122T180000Z", MANIFEST | empty | extra | {"counts": counts})
        for shown in ("    of a crashed run                 0\n", "  rejected                           0\n"):
            assert shown in text
        assert "\n  seconds saved                    0.0\n" in text
        for absent in ("padding", "ran on", "rejected records"):
            assert absent not in text
