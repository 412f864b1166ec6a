import pytest

from transforms import storage


def test_a_folder_that_cannot_be_made_is_an_error_and_no_endless_loop(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(FileNotFoundError):
        storage.create_exclusively(str(tmp_path / "link" / "output" / "file"), b"data")


@pytest.mark.parametrize("url", ["", "gs:/bucket/folder", "s3://bucket/folder"])
def test_an_output_that_is_neither_a_folder_nor_gs_is_refused(url):
    with pytest.raises(ValueError, match="is neither a folder of this machine nor gs://"):
        storage.check_url(url)
